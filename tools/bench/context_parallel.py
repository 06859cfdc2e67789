"""Context-parallel attention measured on CPU processes, and simulated on clusters.

`real`: mask patterns x schedules x world sizes over gloo: time of forward + backward, bytes counted against
those that the formulas give, peak memory of the call's own buffers, largest error against fp64. The baselines
stand in the same run: the dense zigzag ring, and an ideal share (this rank's part of the heads over the whole
sequence, no exchange). `simulate`: the cost model's event-by-event times from the same index and layout for a
hardware profile, up to 1,024 ranks, and which schedule wins where; the published per-layer times of arXiv
2510.18830 beside the model's.
"""

from __future__ import annotations

import argparse
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

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from context_parallel_tables import real_table, simulated_table, write_report
from torch import Tensor

from ltrain.attention.context_parallel import context_parallel_attention
from ltrain.attention.cost_model import Setting, Shapes, needed_token_heads, predict
from ltrain.attention.profile import PROFILES, Profile
from ltrain.attention.work import Entries, Work, visible_entries
from ltrain.parallel.collectives import Traffic
from ltrain.parallel.layout import SequenceLayout
from ltrain_kernels.block_sparse import BlockIndex, block_sparse_attention, closed

PATTERNS = ("dense", "window", "strided", "slashes", "random")
SCHEDULES = ("ring", "all_gather", "ulysses", "needed", "hierarchical", "nested_ring", "ulysses_ring")


def make_index(
    pattern: str, num_tokens: int, block: int, kv_heads: int, density: float, seed: int = 0
) -> BlockIndex:
    """The index of a pattern over the whole sequence; `density` is the share of causal blocks for the last
    two."""
    blocks = -(-num_tokens // block)
    if pattern == "dense":
        return closed.dense(num_tokens, block)
    if pattern == "window":
        return closed.sliding_window(num_tokens, block, local=min(33, max(2, blocks // 16)))
    if pattern == "strided":
        stride = max(2, kv_heads)
        residues = [-h % stride for h in range(kv_heads)]
        return closed.strided(num_tokens, block, local=16, stride=stride, residues=residues)
    if pattern == "slashes":
        offsets = slash_offsets(blocks, kv_heads, density, seed)
        width = max(len(o) for o in offsets)
        ids = torch.full((1, kv_heads, blocks, width), -1)
        rows = torch.arange(blocks)[:, None]
        for head, own in enumerate(offsets):
            ids[0, head, :, : len(own)] = (rows - torch.from_numpy(own)[None]).clamp(min=-1)
        return BlockIndex.from_rows(ids, blocks, block, block)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, kv_heads, blocks, blocks, generator=generator) < density
    mask |= torch.eye(blocks, dtype=torch.bool)
    return BlockIndex.from_mask(mask, block, block, causal=True)


def slash_offsets(blocks: int, heads: int, density: float, seed: int) -> list[np.ndarray]:
    """Block diagonals of each head: the nearest quarter of the budget, the rest log-uniform, as found in
    practice."""
    rng = np.random.default_rng(seed)
    budget, found = density * blocks * (blocks + 1) / 2, []
    for _ in range(heads):
        near = max(1, int(budget / blocks / 4))
        far = np.unique(np.exp(rng.uniform(0, np.log(max(blocks, 2)), 4 * blocks)).astype(int))
        own, area = list(range(near)), sum(blocks - o for o in range(near))
        for offset in rng.permutation(far[(far >= near) & (far < blocks)]):
            if area >= budget:
                break
            own.append(int(offset))
            area += blocks - int(offset)
        found.append(np.array(sorted(own)))
    return found


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
        expected, found = layout.shard(reference.detach(), rank, 1), found.detach()
        if expected.numel():
            worst = max(worst, float((expected - found).abs().max() / reference.detach().abs().max()))
    return worst


def _worker(rank: int, world: int, store: str, jobs: list[Job], results: Any) -> None:
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


def run_world(world: int, jobs: list[Job]) -> list[dict[str, Any]]:
    """All jobs on `world` processes of one thread; the slowest rank's times, the largest of the rest."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        processes = [
            context.Process(target=_worker, args=(r, world, f"{folder}/store", jobs, results))
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
        for job, found in zip(jobs, run_world(world, jobs), strict=True):
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


def simulate(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Predictions of all schedules for worlds x profiles x patterns, as rows."""
    rows = []
    for profile_name in options.profiles:
        profile = PROFILES[profile_name] if profile_name in PROFILES else Profile.load(profile_name)
        for pattern in options.patterns:
            index = make_index(pattern, options.tokens, options.block, options.kv_heads, options.density)
            shapes = Shapes(options.q_heads, options.kv_heads, options.head_dim, options.head_dim)
            for world in options.worlds:
                layout = SequenceLayout("striped", options.tokens, world, options.block)
                entries = visible_entries(index, layout, options.q_heads)
                for schedule in ("halo", *SCHEDULES) if pattern == "window" else SCHEDULES:
                    rows.append(_predicted(schedule, pattern, entries, layout, shapes, profile, options))
    return rows


def _predicted(
    schedule: str,
    pattern: str,
    entries: Entries,
    layout: SequenceLayout,
    shapes: Shapes,
    profile: Profile,
    options: argparse.Namespace,
) -> dict[str, Any]:
    if schedule in ("needed", "halo"):
        layout = SequenceLayout("zigzag", layout.num_tokens, layout.world_size, layout.block)
    work = Work.of(entries, layout, options.q_heads)
    needed = needed_token_heads(entries, layout, options.kv_heads) if schedule in ("needed", "halo") else None
    found = predict(schedule, Setting(work, shapes, profile, needed))
    return {
        "profile": profile.name,
        "pattern": pattern,
        "world": layout.world_size,
        **asdict(found),
        "imbalance": work.imbalance,
    }


def published() -> list[tuple[str, float, float]]:
    """(schedule, published ms, predicted ms) of a forward layer: Qwen2.5-3B heads, 512K, 4 x 8 A100, 95 %
    sparse."""
    tokens, ranks, block, select_ms = 524288, 32, 128, 1.13
    blocks = tokens // block
    offsets = slash_offsets(blocks, 16, 0.05, 0)
    rows = [np.concatenate([np.arange(o, blocks) for o in own]) for own in offsets]
    cols = [np.concatenate([np.arange(blocks - o) for o in own]) for own in offsets]
    heads = np.concatenate([np.full(len(r), h) for h, r in enumerate(rows)])
    layout = SequenceLayout("striped", tokens, ranks, block)
    work = Work.of(Entries(np.concatenate(rows), np.concatenate(cols), heads, 16, 1), layout, 16)
    setting = Setting(work, Shapes(16, 2, 128, 128), PROFILES["a100-40gb-hdr"])
    return [
        (name, ms, predict(name, setting).forward_s * 1e3 + select_ms)
        for name, ms in (("ring", 34.10), ("nested_ring", 19.53))
    ]


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
    parser.add_argument(
        "--memory", action="store_true", help="also measure peak memory (a profiled extra call)"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file; report: read them")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks/context_parallel.md"))
    options = parser.parse_args(argv)
    if options.mode == "report":
        write_report(options.json, options.page)
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
