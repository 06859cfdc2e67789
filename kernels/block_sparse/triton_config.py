"""Tile sizes of the Triton kernels: a checked-in table of measured choices, and a rule for what it doesn't
list.

Nothing is tuned at run time: a run must not depend on timing noise, and two ranks must never choose different
tiles (they would round differently). `tools/bench/tune_attention.py` measures candidates on a GPU and writes
the table.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

KernelName = Literal["forward", "dq", "dkdv"]

TABLE = Path(__file__).with_name("triton_tiles.json")
# Shared memory that one program may use, in bytes, by compute capability.
SHARED_BYTES = {90: 232448, 80: 166912, 86: 101376, 89: 101376, 100: 232448, 120: 101376}


@dataclass(frozen=True)
class Tile:
    """One launch choice: `rows` query rows (tokens x packed heads) by `cols` keys, warps, pipeline stages.

    `one_loop` (forward only): one loop that branches for partial blocks, so that their loads are prefetched
    too; else a loop for full blocks and one for partial blocks. `explicit`: the kernels of `hopper_fwd` and
    `hopper_bwd`, whose pipeline is written out (sm_90, 16-bit inputs; one warp for 16 rows of the sums).
    """

    rows: int
    cols: int
    num_warps: int
    num_stages: int
    one_loop: bool = True
    maxnreg: int | None = None
    explicit: bool = False


@dataclass(frozen=True)
class TileKey:
    """What a choice depends on: kernel, compute capability (90, 80), bits of an element, padded head size,
    and the most rows and columns that a tile may have without crossing a block of the index."""

    kernel: KernelName
    arch: int
    bits: int
    head_dim: int
    max_rows: int
    max_cols: int

    def __str__(self) -> str:
        return f"{self.kernel}/sm{self.arch}/{self.bits}bit/d{self.head_dim}/{self.max_rows}x{self.max_cols}"


def power_of_two_divisor(n: int, limit: int) -> int:
    """Largest power of two that divides n, at most `limit`."""
    return min(n & -n, limit)


def shared_bytes(kernel: KernelName, tile: Tile, head_dim: int, bits: int) -> int:
    """Bytes that the pipelined operands take: the fixed tiles once, the streamed ones once a stage."""
    fixed, streamed = (tile.cols, tile.rows) if kernel == "dkdv" else (tile.rows, tile.cols)
    num_fixed = 1 if kernel == "forward" else 2
    return (num_fixed * fixed + 2 * streamed * tile.num_stages) * head_dim * bits // 8


def derive_tile(key: TileKey) -> Tile:
    """The rule for unlisted keys: 64 x 64 (two programs of 4 warps then share a multiprocessor and hide each
    other's waits), smaller where blocks, fp32 or a large head size ask for it, with as many stages as fit.

    Measured on sm_90 for 16-bit head size 128; elsewhere it is a rule that compiles without spilling, not an
    optimum.
    """
    side = 64 if key.bits == 16 and key.head_dim <= 128 else 32
    rows, cols = min(key.max_rows, side), min(key.max_cols, side)
    limit = SHARED_BYTES.get(key.arch, 101376) // 2 - 2048
    stages = 3 if key.kernel == "forward" else 2
    tile = Tile(rows, cols, 4, stages)
    while shared_bytes(key.kernel, tile, key.head_dim, key.bits) > limit:
        if stages > 1:
            stages -= 1
        elif max(rows, cols) > 16:
            rows, cols = (rows // 2, cols) if rows >= cols else (rows, cols // 2)
            stages = 2
        else:
            raise ValueError(f"no tile of {key} fits {limit} bytes of shared memory; use a smaller head size")
        tile = Tile(rows, cols, 4, stages)
    explicit = key.arch == 90 and key.bits == 16 and key.head_dim in (64, 128) and rows == cols == 64
    return replace(tile, explicit=explicit)


@functools.cache
def load_table(path: Path = TABLE) -> dict[str, Tile]:
    """The checked-in table, key string -> tile."""
    return {key: Tile(**value) for key, value in json.loads(path.read_text())["tiles"].items()}


def save_table(tiles: dict[str, Tile], source: str, path: Path = TABLE) -> None:
    """Write a table; `source` says what was measured and on what."""
    text = {"source": source, "tiles": {key: asdict(tile) for key, tile in sorted(tiles.items())}}
    path.write_text(json.dumps(text, indent=1) + "\n")


def choose_tile(key: TileKey) -> Tile:
    """The table's choice for `key`, else the rule's."""
    return load_table().get(str(key)) or derive_tile(key)
