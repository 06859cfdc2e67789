"""Triton kernels of rows and block scores: interpreted against fp64 definitions, compiled for sm_90."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("elimination_interpreted.py")
CASES = ("rows", "rows, odd size", "rows, bf16", "scores", "scores, causal", "scores, ragged", "scores, wide")


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


ROWS_COMPILED = [
    (name, block, dtype)
    for name in ("norm", "norm backward", "add", "replace")
    for block, dtype in ((1024, "bf16"), (4096, "bf16"), (4096, "fp32"), (8192, "bf16"))
]


@pytest.mark.parametrize("name,block,dtype", ROWS_COMPILED)
def test_rows_compile_for_sm_90_without_spills(name, block, dtype, tmp_path, monkeypatch):
    from ltrain_kernels.rows import triton_rows as rows

    fn, constants = {
        "norm": (rows.norm_rows_kernel, {}),
        "norm backward": (rows.norm_rows_backward_kernel, {"ROWS": 32}),
        "add": (rows.write_rows_kernel, {"ADD": True}),
        "replace": (rows.write_rows_kernel, {"ADD": False}),
    }[name]
    report = _compile(fn, constants | {"BLOCK": block}, dtype, rows.warps(block), tmp_path, monkeypatch)
    assert (report.stack_bytes, report.spill_instructions) == (0, 0), report


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "block,dim,dtype",
    [(16, 64, "bf16"), (64, 128, "bf16"), (128, 128, "bf16"), (256, 96, "bf16"), (128, 128, "fp32")],
)
def test_scores_compile_for_sm_90_without_spills(block, dim, dtype, causal, tmp_path, monkeypatch):
    from ltrain_kernels.block_scores.triton_scores import block_scores_kernel, tile

    side, warps = tile(block, torch.float32 if dtype == "fp32" else torch.bfloat16)
    constants = {
        "HEADS": 32, "GROUP": 4, "D": dim, "BLOCK_D": 1 << (dim - 1).bit_length(), "BLOCK": block,
        "TILE": side, "CAUSAL": causal, "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }  # fmt: skip
    report = _compile(block_scores_kernel, constants, dtype, warps, tmp_path, monkeypatch)
    assert (report.stack_bytes, report.spill_instructions) == (0, 0), report
    assert report.warpgroup_mma > 0 or dtype == "fp32" or block < 64


def _compile(fn, constants, dtype, warps, folder, monkeypatch):
    import triton
    from support.triton_aot import inspect
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    signature, attrs = _signature(fn, constants, dtype)
    where = {(fn.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(fn, signature, where, attrs)
    return inspect(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}))
