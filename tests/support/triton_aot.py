"""Compiles a Triton kernel for a GPU that isn't there and reads what the assembler says about it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from ltrain_kernels.block_sparse.hopper_bwd import attention_dkdv_hopper, attention_dq_hopper
from ltrain_kernels.block_sparse.hopper_fwd import attention_forward_hopper
from ltrain_kernels.block_sparse.triton_bwd import attention_delta, attention_dkdv, attention_dq
from ltrain_kernels.block_sparse.triton_config import Tile, TileKey, choose_tile
from ltrain_kernels.block_sparse.triton_fwd import attention_forward

KERNELS = {"forward": attention_forward, "dq": attention_dq, "dkdv": attention_dkdv, "delta": attention_delta}
HOPPER_KERNELS = {
    "forward": attention_forward_hopper,
    "dq": attention_dq_hopper,
    "dkdv": attention_dkdv_hopper,
}
INTEGER_TABLES = {"items", "bounds", "entries", "pattern", "q_pos", "k_pos", "q_doc", "k_doc"}
FLOAT_TABLES = {"lse", "lse2", "delta", "dlse"}


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel. `pack` query heads of `rows // pack` tokens make a tile of tile.rows
    rows."""

    kernel: str
    arch: int
    tile: Tile | None = None
    dtype: str = "bf16"
    head_dim: int = 128
    block_q: int = 128
    block_k: int = 128
    group: int = 1
    pack: int = 1
    closed: bool = False
    docs: bool = False
    window: bool = False
    accumulate: bool = False
    per_query_head: bool = False


@dataclass(frozen=True)
class Report:
    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    warpgroup_mma: int
    serialized_mma: int
    num_warps: int


def shipped(variant: Variant) -> Tile:
    """The tile that a launch of this variant would use."""
    if variant.tile is not None:
        return variant.tile
    bits = 32 if variant.dtype == "fp32" else 16
    rows, cols = min(variant.block_q * variant.pack, 128), min(variant.block_k, 128)
    return choose_tile(TileKey(variant.kernel, variant.arch, bits, variant.head_dim, rows, cols))


def compile_variant(variant: Variant) -> Report:
    """Compile for `cuda:arch`; registers, stack and instruction counts come from the wheel's cuobjdump."""
    tma = variant.arch >= 90
    dim = variant.head_dim
    if variant.kernel == "delta":
        tile, boxes = Tile(64, 64, 4, 3), {}
        constants = {"ROWS": 64, "DV": dim, "BLOCK_DV": dim, "HAS_DLSE": True}
    else:
        tile = shipped(variant)
        pack = min(variant.pack, tile.rows)
        rows = min(variant.block_q, tile.rows // pack)
        pack = tile.rows // rows
        constants = {
            "GROUP": variant.group, "PACK": pack, "PER_QUERY_HEAD": variant.per_query_head, "ROWS": rows,
            "COLS": tile.cols, "SPLIT_Q": variant.block_q // rows, "SPLIT_K": variant.block_k // tile.cols,
            "D": dim, "BLOCK_D": dim, "DV": dim, "BLOCK_DV": dim, "CLOSED": variant.closed,
            "HAS_DOC": variant.docs, "HAS_WINDOW": variant.window, "ACCUMULATE": variant.accumulate,
            "TMA": tma, "UPCAST": False, "PRECISION": "ieee" if variant.dtype == "fp32" else "tf32",
            "ONE_LOOP": tile.one_loop,
        }  # fmt: skip
        of_queries, of_keys = [1, pack, rows, dim], [1, 1, tile.cols, dim]
        boxes = {"k": of_keys, "v": of_keys}
        if variant.kernel == "dkdv":
            boxes = {"q": of_queries, "dout": of_queries}
        if tile.explicit:
            boxes = {"q": of_queries, "dout": of_queries, "k": of_keys, "v": of_keys}
        if not tma:
            boxes = {}
    fn = (HOPPER_KERNELS if tile.explicit else KERNELS)[variant.kernel]
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}

    signature, attrs = {}, {}
    for index, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGER_TABLES:
            signature[name] = "*i32"
        elif name in FLOAT_TABLES:
            signature[name] = "*fp32"
        elif name in ("scale", "scale_log2"):
            signature[name] = "fp32"
        elif name in boxes:
            signature[name] = _descriptor_type(variant.dtype, boxes[name], tile.explicit)
        elif name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
            grad = name in ("dq", "dk", "dv") and variant.accumulate
            signature[name] = "*fp32" if grad else f"*{variant.dtype}"
        else:
            signature[name] = "i32"
        strided = name[-2:] in ("_b", "_h", "_t") and not name.startswith(("bounds", "pattern"))
        if signature[name].startswith("*") or strided:
            attrs[(index,)] = [["tt.divisibility", 16]]
    options = {"num_warps": tile.num_warps}
    if not tile.explicit:
        options["num_stages"] = tile.num_stages
    if tile.maxnreg is not None:
        options["maxnreg"] = tile.maxnreg
    source = GluonASTSource if tile.explicit else ASTSource
    values = {(fn.arg_names.index(k),): v for k, v in constants.items()}
    compiled = triton.compile(
        source(fn, signature, values, attrs), target=GPUTarget("cuda", variant.arch, 32), options=options
    )
    return inspect(compiled)


def _descriptor_type(dtype: str, box: list[int], explicit: bool) -> str:
    """Type of a tensor descriptor: where the pipeline is written out, the layout in shared memory is part of
    it."""
    if not explicit:
        return f"tensordesc<{dtype}{box}>"
    element = gl.bfloat16 if dtype == "bf16" else gl.float16
    return f"tensordesc<{dtype}{box},{gl.NVMMASharedLayout.get_default_for(box, element)!r}>"


def inspect(compiled) -> Report:
    """Resource report of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        spill_instructions=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        shared_bytes=compiled.metadata.shared,
        warpgroup_mma=len(re.findall(r"\bHGMMA\b", sass)),
        serialized_mma=_serialized(sass),
        num_warps=compiled.metadata.num_warps,
    )


def _serialized(sass: str) -> int:
    """Warpgroup multiplications that the assembler made to wait for the one just before.

    It does so (with a mere warning) where it can't prove that registers of a pending one are left alone; the
    kernel is still right and half as fast. In a run of such instructions only the last should signal the
    scoreboard.
    """
    lines = [line for line in sass.splitlines() if re.search(r"/\*[0-9a-f]{4,5}\*/\s", line)]
    previous, count = False, 0
    for line in lines:
        if "HGMMA" in line:
            signals = "gsb0" in line
            count += previous and signals
            previous = signals
    return count
