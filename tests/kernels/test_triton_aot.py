"""Compiles the Triton kernels for GPUs that aren't there, with the tiles that ship, and reads the assembler's
report.

The gate of sm_90: no stack and no spilled register, shared memory within the limit, warpgroup matrix
instructions, and none of those made to wait for the one before (the assembler does that silently where it
loses track of registers; it halves the rate). On sm_80: shared memory within the limit, and no more than a
few spilled registers.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

from support.triton_aot import HOPPER_KERNELS, KERNELS, Report, Variant, compile_variant

from ltrain_kernels import block_sparse
from ltrain_kernels.block_sparse.triton_config import SHARED_BYTES, Tile

VARIANTS = {
    "delta": Variant("delta", 90),
    **{
        f"{kernel}-{name}": Variant(kernel, 90, **options)
        for kernel in ("forward", "dq", "dkdv")
        for name, options in {
            "lists": {},
            "closed": {"closed": True, "block_q": 64, "block_k": 64, "group": 4, "pack": 1},
            "documents": {"docs": True, "window": True, "accumulate": kernel != "forward"},
            "head64": {"head_dim": 64, "dtype": "fp16"},
        }.items()
    },
    # Where the pipeline is the compiler's: operands that the copy engine can't read, v of another size.
    **{
        f"{kernel}-pipeliner-{name}": Variant(kernel, 90, Tile(64, 64, 4, stages), **options)
        for kernel, stages in (("forward", 3), ("dq", 2), ("dkdv", 2))
        for name, options in {
            "lists": {},
            "documents": {"docs": True, "window": True, "accumulate": kernel != "forward"},
        }.items()
    },
    **{
        f"{kernel}-{name}": Variant(kernel, 90, **options)
        for kernel in ("forward", "dkdv")
        for name, options in {
            "packed": {"block_q": 32, "block_k": 64, "group": 4, "pack": 2},
            "per query head": {"group": 4, "per_query_head": True},
        }.items()
    },
    **{f"{kernel}-sm80": Variant(kernel, 80) for kernel in ("forward", "dq", "dkdv")},
}  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Every variant compiled from nothing, two at a time."""
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    try:
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            return dict(zip(VARIANTS, pool.map(compile_variant, VARIANTS.values()), strict=True))
    finally:
        del os.environ["TRITON_CACHE_DIR"]


@pytest.mark.parametrize("name", VARIANTS)
def test_shared_memory_fits(reports, name):
    assert reports[name].shared_bytes <= SHARED_BYTES[VARIANTS[name].arch]


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.arch == 90])
def test_no_spills(reports, name):
    assert (reports[name].stack_bytes, reports[name].spill_instructions) == (0, 0), reports[name]


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.arch == 90 and v.kernel != "delta"])
def test_warpgroup_instructions(reports, name):
    assert reports[name].warpgroup_mma > 0
    assert reports[name].serialized_mma == 0, reports[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_block_of_threads_fits_the_register_file(reports, name):
    report = reports[name]
    assert report.registers <= 255 and report.registers * 32 * report.num_warps <= 65536, report


def test_every_kernel_that_is_launched_is_compiled_here():
    launched, jitted = set(), set()
    for path in Path(block_sparse.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            # kernel[grid](...)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value))
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(d).startswith(("triton.jit", "gluon.jit")) for d in node.decorator_list
            ):
                jitted.add(node.name)
    known = {kernel.fn.__name__ for kernel in (*KERNELS.values(), *HOPPER_KERNELS.values())}
    assert launched & jitted == known
    for arch in (80, 90):
        compiled = {v.kernel for v in VARIANTS.values() if v.arch == arch} | {"delta"}
        assert compiled == set(KERNELS)


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.arch == 80])
def test_few_spills_on_ampere(reports, name):
    assert reports[name].stack_bytes <= 256, reports[name]
