"""What it costs to find a pattern online: one layer's search on context-parallel ranks over gloo.

    python tools/bench/search.py --tokens 32768 --ranks 2

Patterns, heads and block are those of sparse_step.py. Ranks begin together, so that none waits for
another one's earlier work, which `time/selection_s` of a run includes. Prints medians of the slowest
rank: wall and CPU seconds, and bytes sent by all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import TypeAdapter
from sparse_step import patterns as configured

from ltrain.attention import patterns
from ltrain.attention.select import select_distributed
from ltrain.config.patterns import PatternConfig
from ltrain.parallel.collectives import Traffic
from ltrain.parallel.layout import SequenceLayout

Q_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64


def measure(rank: int, args: argparse.Namespace, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    layout = SequenceLayout("striped", args.tokens, args.ranks, args.block)
    generator = torch.Generator().manual_seed(0)
    q, k = (
        layout.shard(torch.randn(1, args.tokens, heads, HEAD_DIM, generator=generator), rank, 1)
        for heads in (Q_HEADS, KV_HEADS)
    )
    for name, fields in configured(args.tokens, args.block).items():
        rule = patterns.from_config(TypeAdapter(PatternConfig).validate_python(fields))
        if rule.static or name == "seer_gate":  # its gate is a module, and its own loss most of the time
            continue
        wall, cpu, sent = [], [], 0
        for _ in range(args.repeats + 1):
            traffic = Traffic(None)
            dist.barrier()
            began, worked = time.perf_counter(), time.process_time()
            selection = select_distributed(
                rule, q, k, layout=layout, group=dist.group.WORLD, layer=1, num_layers=2, traffic=traffic
            )
            if selection.verticals is not None:
                selection.verticals.tiles(selection.index)
            cpu.append(time.process_time() - worked)
            wall.append(time.perf_counter() - began)
            sent = traffic.bytes_sent
        own = [statistics.median(wall[1:]), statistics.median(cpu[1:]), float(sent)]
        found: list[Any] = [None] * args.ranks
        dist.all_gather_object(found, own)
        if rank == 0:
            cells = [max(one[i] for one in found) * 1e3 for i in (0, 1)]
            total = sum(one[2] for one in found) / 1e6
            print(f"| `{name}` | {cells[0]:.1f} | {cells[1]:.1f} | {total:.2f} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print("| pattern | wall ms | CPU ms | MB sent |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (args, f"{folder}/store"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
