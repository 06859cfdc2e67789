"""Measures what the cost model needs: links inside and between nodes, kernel rates, host time of a call.

Run on every rank of the group that is to share sequences; takes some seconds. `ltrain calibrate` writes the
profile that `context_parallel_attention` takes. The figures hold for the load and the clock of the moment.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ltrain.attention.profile import Link, Profile, device_name
from ltrain.config.base import ConfigError
from ltrain.parallel.collectives import Channel, Group, channel, rank_in, size_of
from ltrain_kernels.block_sparse import (
    attention_backward,
    attention_delta,
    attention_forward,
    closed,
    prepare,
)


def calibrate(
    group: Group,
    *,
    node_size: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    heads: int = 4,
    tokens: int = 2048,
    path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure and return a profile as a dict, equal on all ranks (the slowest rank's figures); rank 0 writes
    `path`.

    node_size: consecutive ranks that share a node; None: all of them. A link class that the group doesn't
    have is given the figures of the other. tokens: longest chunk that the kernel is measured with. Collective
    over `group`.
    """
    device = torch.device(device)
    size = size_of(group)
    lanes = size if node_size is None else node_size
    if lanes < 1 or size % lanes:
        raise ConfigError("node_size", lanes, f"must divide the group's {size} ranks")
    links = channel(group, "calibrate")
    near = measure_link(links, 1, lanes, device) if lanes > 1 else None
    far = measure_link(links, lanes, size, device) if lanes < size else None
    fallback = near or far or (1e3, 0.0)
    long_s, short_s, backward_factor, step_s = _measure_kernel(device, dtype, heads, head_dim, tokens)
    measured = torch.tensor(
        [
            *(near or fallback),
            *(far or fallback),
            long_s,
            short_s,
            backward_factor,
            step_s,
            _measure_memory(device),
        ],
        dtype=torch.float64,
    )
    measured = _slowest(measured, group, device)
    rate, half = _fit(measured[4], measured[5], heads, head_dim, tokens)
    profile = Profile(
        name=f"measured-{size}-ranks",
        device=device_name(device),
        node_size=lanes,
        in_node=Link(measured[0], measured[1]),
        between_nodes=Link(measured[2], measured[3]),
        kernel_tflops=rate / 1e12,
        half_tokens=half,
        backward_factor=measured[6],
        step_s=measured[7],
        memory_gb_s=measured[8],
        source=f"ltrain calibrate, {dtype}, head size {head_dim}",
    )
    if path is not None and rank_in(group) == 0:
        profile.save(path)
    return asdict(profile)


def measure_link(links: Channel, distance: int, span: int, device: torch.device) -> tuple[float, float]:
    """(GB/s, latency in s) of all ranks sending at once to the rank `distance` on, in runs of `span`
    ranks."""
    start = links.me // span * span
    to = start + (links.me - start + distance) % span
    source = start + (links.me - start - distance) % span

    def send(num_bytes: int) -> Callable[[], None]:
        out = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        into = torch.empty_like(out)

        def once() -> None:
            links.exchange([(to, out)], [(source, into)]).wait()

        return once

    small, large = 1024, 8 << 20
    latency, slow = _seconds(send(small), device, 10), _seconds(send(large), device, 5)
    return (large - small) / max(slow - latency, 1e-9) / 1e9, latency


def _measure_kernel(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, tokens: int
) -> tuple[float, float, float, float]:
    """(s per flop with long chunks, s per flop with short ones, backward over forward, host s of a tiny
    call)."""

    def call(length: int, backward: bool) -> float:
        q, k, v, dout = (
            torch.randn(1, length, heads, head_dim, device=device, dtype=dtype) for _ in range(4)
        )
        pos = torch.arange(length, dtype=torch.int32, device=device)
        # Full blocks only: every query comes after every key.
        index = (
            closed.dense(2 * length, 128)
            .to(device)
            .select(list(range(length // 128, 2 * length // 128)), list(range(length // 128)))
        )
        plan = prepare(index, q_pos=pos + length, k_pos=pos)
        out, lse = attention_forward(q, k, v, plan)
        delta = attention_delta(out, dout)
        if backward:
            return _seconds(lambda: attention_backward(dout, q, k, v, delta, lse, plan), device, 3)
        return _seconds(lambda: attention_forward(q, k, v, plan), device, 3)

    def flops(length: int) -> float:
        return 4.0 * length * length * heads * head_dim

    short = 256
    forward = call(tokens, False)
    return (
        forward / flops(tokens),
        call(short, False) / flops(short),
        call(tokens, True) / forward,
        call(128, False),
    )


def _fit(long_s: float, short_s: float, heads: int, head_dim: int, tokens: int) -> tuple[float, float]:
    """(flop/s at full length, half length in tokens) of rate(n) = rate x n / (n + half), from two chunk
    lengths."""
    short = 256
    # 1 / rate(n) = (1 + half / n) / rate, at two lengths.
    slope = (short_s - long_s) / (1 / short - 1 / tokens)
    base = max(long_s - slope / tokens, long_s / 4)
    return 1 / base, max(slope, 0.0) / base


def _measure_memory(device: torch.device) -> float:
    """GB/s of reading and writing device memory."""
    x = torch.zeros(8 << 20, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / _seconds(lambda: y.copy_(x), device, 5) / 1e9


def _seconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _slowest(measured: torch.Tensor, group: Group, device: torch.device) -> list[float]:
    """The slowest rank's figures: rates are the first of each link pair and the last one, the others are
    times."""
    if size_of(group) > 1:
        sign = torch.tensor([-1.0, 1, -1, 1, 1, 1, 1, 1, -1], dtype=torch.float64)
        moved = (measured * sign).to(device)
        dist.all_reduce(moved, op=dist.ReduceOp.MAX, group=group)
        measured = moved.cpu() * sign
    return measured.tolist()


def main(argv: list[str] | None = None) -> int:
    """`ltrain calibrate`, alone or under torchrun: measure on all processes, write the profile, print it."""
    parser = argparse.ArgumentParser(prog="ltrain calibrate", description=main.__doc__)
    parser.add_argument("--output", default="profile.json", help="file to write")
    parser.add_argument("--node-size", type=int, help="processes of a node; default: as launched by torchrun")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="longest chunk to measure the kernel with")
    options = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    launched = "RANK" in os.environ
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if launched:
        dist.init_process_group("nccl" if cuda else "gloo")
    node_size = options.node_size or (int(os.environ["LOCAL_WORLD_SIZE"]) if launched else None)
    try:
        found = calibrate(
            dist.group.WORLD if launched else None, node_size=node_size, device=device, path=options.output,
            dtype=torch.bfloat16 if cuda else torch.float32, head_dim=options.head_dim, tokens=options.tokens,
        )  # fmt: skip
        if rank_in(None) == 0:
            print(f"wrote {options.output}")
            for name, value in found.items():
                print(f"  {name}: {value}")
    finally:
        if launched:
            dist.destroy_process_group()
    return 0
