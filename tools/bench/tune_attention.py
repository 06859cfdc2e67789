"""Times candidate tiles of each Triton attention kernel on one GPU, and writes the table that the kernels
read.

    python tools/bench/tune_attention.py --out results/ [--write]

Every candidate runs on a dense and on a 90 % dropped random index; the one with the least summed relative
time wins its key. Candidates that don't compile, spill registers or don't fit are listed with the reason.
`--write` replaces kernels/block_sparse/triton_tiles.json; without it the table only goes to --out.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from attention_gpu import DEVICE, Cell, causal_random, median_ms, tensors, visible_pairs

from ltrain_kernels.block_sparse import BlockIndex, attention_delta, prepare
from ltrain_kernels.block_sparse import triton_attention as kernels
from ltrain_kernels.block_sparse.triton_config import TABLE, Tile, TileKey, load_table, save_table

# Candidates by kernel; those beyond a key's blocks are left out.
CANDIDATES = {
    "forward": [
        Tile(64, 64, 4, 3, explicit=True), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 128, 8, 2),
        Tile(128, 64, 8, 2), Tile(128, 64, 8, 3),
    ],
    "dq": [
        Tile(64, 64, 4, 2, explicit=True), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(128, 64, 8, 2),
        Tile(128, 128, 8, 2),
    ],
    "dkdv": [
        Tile(64, 64, 4, 2, explicit=True), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 128, 8, 2),
        Tile(64, 128, 8, 3),
    ],
}  # fmt: skip


def tune(
    cell_shape: tuple[int, int, int, int], report: list[dict[str, Any]], only: list[str]
) -> dict[TileKey, Tile]:
    """Best tiles for (tokens, heads, kv heads, block)."""
    tokens, heads, kv_heads, block = cell_shape
    pos = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
    cases = []
    for kept in (1.1, 0.1):
        cell = Cell("tune", tokens, heads, kv_heads, block, kept=kept)
        index = BlockIndex.from_mask(causal_random(kv_heads, tokens // block, kept), block, block)
        cases.append((cell, index, prepare(index, q_pos=pos, k_pos=pos)))
    q, k, v, dout = tensors(cases[0][0])
    scale = q.shape[-1] ** -0.5
    most_rows = min(128, block * heads // kv_heads)
    best: dict[TileKey, Tile] = {}
    made = [kernels.forward(q, k, v, plan, scale, q.dtype) for _, _, plan in cases]
    for name in only:
        key = TileKey(name, kernels._capability(q), 16, q.shape[-1], most_rows, min(128, block))
        lowest = None
        for tile in CANDIDATES[name]:
            if tile.rows > most_rows or tile.cols > block:
                continue
            entry: dict[str, Any] = {"key": str(key), "tile": asdict(tile), "tflops": []}
            try:
                times = []
                for (cell, index, plan), (out, lse) in zip(cases, made, strict=True):
                    into = tuple(torch.empty_like(x) for x in (q, k, v))
                    delta = attention_delta(out, dout)

                    def call(plan=plan, lse=lse, delta=delta, into=into, tile=tile, name=name) -> Any:
                        if name == "forward":
                            return kernels.forward(q, k, v, plan, scale, q.dtype, tile=tile)
                        return kernels.backward(
                            dout, q, k, v, delta, lse, plan, scale, into, accumulate=False,
                            tiles=(tile, None) if name == "dq" else (None, tile), parts=(name,),
                        )  # fmt: skip

                    ms = median_ms(call, repeats=5, warmup=2)
                    factor = {"forward": 4, "dq": 6, "dkdv": 8}[name]
                    entry["tflops"].append(round(factor * 128 * visible_pairs(cell, index) / ms / 1e9, 1))
                    times.append(ms)
                score = sum(1 / rate for rate in entry["tflops"])
                if lowest is None or score < lowest:
                    lowest, best[key] = score, tile
            except Exception as problem:
                entry["error"] = f"{type(problem).__name__}: {problem}"[:160].replace("\n", " ")
            report.append(entry)
            print(entry, flush=True)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--kernels", nargs="+", default=list(CANDIDATES))
    parser.add_argument("--seconds", type=float, default=300)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start, report = time.perf_counter(), []
    tiles = dict(load_table())
    for shape in ((32768, 16, 16, 128), (32768, 16, 16, 64), (32768, 32, 8, 64)):
        if time.perf_counter() - start < args.seconds:
            tiles |= {str(key): tile for key, tile in tune(shape, report, args.kernels).items()}
            (args.out / "tune.json").write_text(json.dumps(report))
    source = f"tune_attention.py on {torch.cuda.get_device_name()}, torch {torch.__version__}"
    save_table(tiles, source, args.out / TABLE.name)
    if args.write:
        save_table(tiles, source)


if __name__ == "__main__":
    main()
