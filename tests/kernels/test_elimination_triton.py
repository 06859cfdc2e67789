"""Triton kernels of rows and block scores: interpreted against fp64 definitions, compiled for sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("elimination_interpreted.py")
CASES = ("rows", "rows, odd size", "rows, bf16", "scores", "scores, causal", "scores, ragged")


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_matches_definition(errors, case):
    limit = 1e-2 if "bf16" in case else 1e-5
    assert all(value <= limit for value in errors[case].values()), errors[case]


def _signature(fn, constants, dtype):
    kinds = {
        "rows": "*i64",
        "place": "*i32",
        "rstd": "*fp32",
        "dweight": "*fp32",
        "eps": "fp32",
        "scale": "fp32",
    }
    tensors = ("x", "y", "weight", "kept", "normed", "grad", "dx", "q", "k")
    signature, attrs = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "out":
            signature[name] = f"*{dtype}" if "x" in fn.arg_names else "*fp32"
        else:
            signature[name] = kinds.get(name, f"*{dtype}" if name in tensors else "i32")
        if signature[name].startswith("*") or name[-2:] in ("_b", "_t", "_h"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    return signature, attrs


@pytest.mark.parametrize("name", ["norm", "norm backward", "write", "scores"])
def test_compiles_for_sm_90_without_spills(name, tmp_path, monkeypatch):
    import triton
    from support.triton_aot import inspect
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ltrain_kernels.block_scores.triton_scores import block_scores_kernel
    from ltrain_kernels.rows import triton_rows as rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fn, constants, warps = {
        "norm": (rows.norm_rows_kernel, {"BLOCK": 4096}, rows.warps(4096)),
        "norm backward": (rows.norm_rows_backward_kernel, {"ROWS": 32, "BLOCK": 4096}, rows.warps(4096)),
        "write": (rows.write_rows_kernel, {"ADD": True, "BLOCK": 4096}, rows.warps(4096)),
        "scores": (
            block_scores_kernel,
            {
                "HEADS": 32,
                "GROUP": 4,
                "D": 128,
                "BLOCK_D": 128,
                "BLOCK": 64,
                "CAUSAL": True,
                "PRECISION": "tf32",
            },
            4,
        ),
    }[name]
    signature, attrs = _signature(fn, constants, "bf16")
    where = {(fn.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(fn, signature, where, attrs)
    report = inspect(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}))
    assert (report.stack_bytes, report.spill_instructions) == (0, 0), report
    if name == "scores":
        assert report.warpgroup_mma > 0
