"""Context-parallel attention measured on CPU processes, and simulated on clusters.

`real`: mask patterns x schedules x world sizes over gloo: time of forward + backward, bytes counted against
those that the formulas give, peak memory of the call's own buffers, largest error against fp64. The baselines
stand in the same run: the dense zigzag ring, and an ideal share (this rank's part of the heads over the whole
sequence, no exchange). With `--link-mbit` every half of the ranks is a node: a network namespace whose link
to the other has this rate (needs root). `simulate`: the cost model's event-by-event times from the same index
and layout for a hardware profile, up to 1,024 ranks, and which schedule wins where; the published per-layer
times of arXiv 2510.18830 beside the model's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import slow_links
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from context_parallel_masks import PATTERNS, make_index
from context_parallel_simulated import SCHEDULES, published, simulate
from context_parallel_tables import real_table, simulated_table, write_report
from torch import Tensor

from ltrain.attention.context_parallel import context_parallel_attention
from ltrain.parallel.collectives import Traffic
from ltrain.parallel.layout import SequenceLayout
from ltrain_kernels.block_sparse import block_sparse_attention

NODES = 2


@dataclass(frozen=True)
class Job:
    pattern: str
    schedule: str
    layout: str
    tokens: int
    block: int
    q_heads: int
    kv_heads: int
    head_dim: int
    density: float
    repeats: int
    node_size: int | None
    memory: bool


def run_job(job: Job, rank: int, world: int) -> dict[str, Any]:
    """Time, bytes, memory of one rank; the schedule "ideal" attends this rank's share of heads with no
    exchange."""
    generator = torch.Generator().manual_seed(1)
    shapes = [
        (1, job.tokens, h, job.head_dim) for h in (job.q_heads, job.kv_heads, job.kv_heads, job.q_heads)
    ]
    whole = [torch.randn(s, generator=generator) for s in shapes]
    index = make_index(job.pattern, job.tokens, job.block, job.kv_heads, job.density)
    layout = SequenceLayout(job.layout, job.tokens, world, job.block)  # type: ignore[arg-type]
    traffic = Traffic(job.node_size)
    if job.schedule == "ideal":
        q_heads, kv_heads = job.q_heads // world, max(job.kv_heads // world, 1)
        part = [x[:, :, : (q_heads if x.shape[2] == job.q_heads else kv_heads)].contiguous() for x in whole]
        if index.heads > 1:
            index = index.select_heads(list(range(kv_heads)))
        pos = torch.arange(job.tokens, dtype=torch.int32)
    else:
        part = [layout.shard(x, rank, 1) for x in whole]
    q, k, v = (x.requires_grad_() for x in part[:3])

    def once() -> Tensor:
        for x in (q, k, v):
            x.grad = None
        if job.schedule == "ideal":
            out, _ = block_sparse_attention(q, k, v, index, q_pos=pos, k_pos=pos)
        else:
            out, _ = context_parallel_attention(
                q,
                k,
                v,
                layout=layout,
                group=dist.group.WORLD,
                index=index,
                schedule=job.schedule,
                node_size=job.node_size,
                traffic=traffic,
            )
        out.backward(part[3])
        return out

    once()
    sent = Traffic(job.node_size)
    sent, traffic = traffic, Traffic(job.node_size)
    seconds, cpu_seconds = [], []
    for _ in range(job.repeats):
        dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        once()
        cpu_seconds.append(time.process_time() - cpu)
        seconds.append(time.perf_counter() - began)
    return {
        "s": statistics.median(seconds),
        "cpu_s": statistics.median(cpu_seconds),
        "bytes": sent.bytes_sent,
        "between_nodes": sent.bytes_between_nodes,
        "wait_s": traffic.wait_s / job.repeats,
        "peak_bytes": peak_bytes(once) if job.memory else None,
    }


def peak_bytes(call: Any) -> int:
    """Most bytes allocated by a call at one time, from torch's own record of CPU allocations."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held, most = 0, 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def error_against_fp64(job: Job, rank: int, world: int) -> float:
    """Largest relative error of out, dq, dk, dv at 1,024 tokens, fp32 against fp64 on one process."""
    tokens = 1024
    index = make_index(job.pattern, tokens, job.block, job.kv_heads, max(job.density, 0.3))
    layout = SequenceLayout(job.layout, tokens, world, job.block)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, tokens, h, job.head_dim) for h in (job.q_heads, job.kv_heads, job.kv_heads, job.q_heads)]
    whole = [torch.randn(s, generator=generator) for s in shapes]
    pos = torch.arange(tokens, dtype=torch.int32)
    wide = [x.double().requires_grad_() for x in whole[:3]]
    out, _ = block_sparse_attention(*wide, index, q_pos=pos, k_pos=pos)
    out.backward(whole[3].double())
    shards = [layout.shard(x, rank, 1).requires_grad_(i < 3) for i, x in enumerate(whole)]
    got, _ = context_parallel_attention(
        *shards[:3],
        layout=layout,
        group=dist.group.WORLD,
        index=index,
        schedule=job.schedule,
        node_size=job.node_size,
    )
    got.backward(shards[3])
    worst = 0.0
    for reference, found in zip(
        [out, *(x.grad for x in wide)], [got, *(x.grad for x in shards[:3])], strict=True
    ):
        assert reference is not None and found is not None
        expected, found = layout.shard(reference.detach(), rank, 1), found.detach()
        if expected.numel():
            worst = max(worst, float((expected - found).abs().max() / reference.detach().abs().max()))
    return worst


def _worker(rank: int, world: int, store: str, jobs: list[Job], results: Any, emulated: bool) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if emulated:
        slow_links.enter(rank // (world // NODES))
        os.environ["GLOO_SOCKET_IFNAME"] = "e0"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    found = []
    for job in jobs:
        row = run_job(job, rank, world)
        row["error"] = error_against_fp64(job, rank, world) if job.schedule != "ideal" else None
        found.append(row)
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def run_world(world: int, jobs: list[Job], link_mbit: int | None = None) -> list[dict[str, Any]]:
    """All jobs on `world` processes of one thread; the slowest rank's times, the largest of the rest."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if link_mbit is not None:
            stack.callback(slow_links.Lab([link_mbit] * NODES).close)
        results = context.Queue()
        processes = [
            context.Process(
                target=_worker, args=(r, world, f"{folder}/store", jobs, results, link_mbit is not None)
            )
            for r in range(world)
        ]
        for process in processes:
            process.start()
        by_rank = [results.get(timeout=3600)[1] for _ in range(world)]
        for process in processes:
            process.join()
    merged = []
    for rows in zip(*by_rank, strict=True):
        merged.append(
            {name: max((r[name] for r in rows if r[name] is not None), default=None) for name in rows[0]}
        )
    return merged


def real(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The grid on real processes, as rows; every world has its own dense zigzag ring and ideal share."""
    rows = []
    for world in options.worlds:
        node = world // 2 if world % 2 == 0 and world > 2 else None
        jobs = []
        for pattern in options.patterns:
            for schedule in ("ideal", *options.schedules):
                if schedule in ("hierarchical", "nested_ring", "ulysses_ring") and node is None:
                    continue
                jobs.append(_job(options, pattern, schedule, "striped", node))
        jobs.insert(0, _job(options, "dense", "ring", "zigzag", node))
        for job, found in zip(jobs, run_world(world, jobs, options.link_mbit), strict=True):
            rows.append({"world": world, **asdict(job), **found})
    return rows


def _job(options: argparse.Namespace, pattern: str, schedule: str, layout: str, node: int | None) -> Job:
    if pattern in ("window", "strided") and schedule in ("needed", "halo"):
        layout = "contiguous"
    return Job(
        pattern,
        schedule,
        layout,
        options.tokens,
        options.block,
        options.q_heads,
        options.kv_heads,
        options.head_dim,
        options.density,
        options.repeats,
        node,
        options.memory,
    )


def main(argv: list[str] | None = None) -> int:
    """`ltrain bench context-parallel real|simulate|published|report`."""
    parser = argparse.ArgumentParser(prog="ltrain bench context-parallel", description=__doc__)
    parser.add_argument("mode", choices=["real", "simulate", "published", "report"])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=["dense", "slashes"])
    parser.add_argument("--schedules", nargs="+", choices=[*SCHEDULES, "halo"], default=["ring", "ulysses"])
    parser.add_argument("--worlds", nargs="+", type=int, default=[2])
    parser.add_argument(
        "--profiles",
        nargs="+",
        default=["a100-40gb-hdr", "h100-ndr", "h200", "ethernet-100g"],
        help="built-in names, or files that ltrain calibrate wrote",
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--q-heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument(
        "--density", type=float, default=0.05, help="share of causal blocks kept, slashes and random"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--link-mbit", type=int, help="real: two nodes, joined at this rate")
    parser.add_argument(
        "--memory", action="store_true", help="also measure peak memory (a profiled extra call)"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file; report: read them")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks/context_parallel.md"))
    parser.add_argument("--mark", default="real ranks", help="report: where in the page")
    options = parser.parse_args(argv)
    if options.mode == "report":
        write_report(options.json, options.page, options.mark)
        return 0
    if options.mode == "published":
        print("| schedule | published ms | predicted ms | ratio |\n|---|---|---|---|")
        for name, ms, predicted in published():
            print(f"| {name} | {ms:.2f} | {predicted:.2f} | {predicted / ms:.3f} |")
        return 0
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores")
    rows = real(options) if options.mode == "real" else simulate(options)
    print(real_table(rows) if options.mode == "real" else simulated_table(rows))
    if options.json:
        facts = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
        options.json.write_text(json.dumps({**facts, "arguments": sys.argv[1:], "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
