"""Time block-sparse attention on the CPU against dense causal SDPA, forward and backward.

    python tools/bench/attention.py --tokens 16384 --threads 2 --out outputs/bench

FlexAttention (`--flex`) is compiled for every mask, which takes a minute each, and has no backward on the
CPU. Every repeat runs each kernel once in turn, so that a change of the machine's load meets all of them; the
table holds medians. Rates count the arithmetic of the kept blocks only: 4 D operations a pair and head in the
forward, 2.5 times that in the backward.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ltrain_kernels.block_sparse import (
    BlockIndex,
    block_sparse_attention,
    dense,
    prepare,
    sliding_window,
    strided,
)
from ltrain_kernels.block_sparse.cpu import extension_loaded

FIELDS = [
    "pattern", "kernel", "dtype", "tokens", "density", "forward_s", "backward_s", "forward_tflop_s",
    "backward_tflop_s", "rate_of_dense", "speedup_over_sdpa", "index_mib", "peak_mib",
]  # fmt: skip


def random_blocks(tokens: int, block: int, heads: int, density: float) -> BlockIndex:
    """A random share `density` of the causal blocks per head, the diagonal always among them."""
    n = -(-tokens // block)
    causal = n * (n + 1) / 2
    rate = max(density * causal - n, 0) / max(causal - n, 1)
    rng = torch.Generator().manual_seed(0)
    mask = torch.rand((1, heads, n, n), generator=rng) < rate
    return BlockIndex.from_mask(mask.tril() | torch.eye(n, dtype=torch.bool), block, block)


def patterns(tokens: int, block: int, kv_heads: int, densities: Sequence[float]) -> dict[str, BlockIndex]:
    residues = [(-head) % 8 for head in range(kv_heads)]
    return {
        "dense": dense(tokens, block),
        "window 8 + 1 sink": sliding_window(tokens, block, local=8, sinks=1),
        "s2 local 4, stride 8": strided(tokens, block, local=4, stride=8, residues=residues),
        **{f"random {d:.0%}": random_blocks(tokens, block, kv_heads, d) for d in densities},
    }


def timed(call: Callable[[], Tensor], dout: Tensor, inputs: Sequence[Tensor]) -> tuple[float, float]:
    for x in inputs:
        x.grad = None
    start = time.perf_counter()
    out = call()
    middle = time.perf_counter()
    if out.requires_grad:
        out.backward(dout)
    return middle - start, time.perf_counter() - middle


def flex(
    q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, tokens: int, num_heads: int
) -> Callable[[], Tensor]:
    """FlexAttention's compiled forward over the same blocks, from lists of blocks: its own mask building
    holds T x T numbers.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    mask = index.to_mask()
    mask = mask.repeat_interleave(num_heads // mask.shape[1], 1) if mask.shape[1] > 1 else mask
    diagonal = torch.eye(mask.shape[-1], dtype=torch.bool)

    def lists(kept: Tensor) -> tuple[Tensor, Tensor]:
        order = kept.int().argsort(dim=-1, descending=True, stable=True)
        return kept.sum(-1, dtype=torch.int32), order.to(torch.int32)

    block_mask = BlockMask.from_kv_blocks(
        *lists(mask & diagonal),
        *lists(mask & ~diagonal),
        BLOCK_SIZE=index.block_q,
        mask_mod=lambda b, h, i, j: i >= j,
        seq_lengths=(tokens, tokens),
    )
    attend = torch.compile(flex_attention, dynamic=False)
    heads_first = [x.detach().transpose(1, 2).contiguous() for x in (q, k, v)]
    return lambda: attend(*heads_first, block_mask=block_mask, enable_gqa=True).transpose(1, 2)


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that a call holds at one time, from torch's own record of CPU allocations."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held, most = 0, 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def bench(args: argparse.Namespace, tokens: int, dtype: torch.dtype) -> list[dict[str, object]]:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, args.head_size, generator=rng).to(dtype).requires_grad_()
        for heads in (args.heads, args.kv_heads, args.kv_heads)
    )
    dout = torch.randn(q.shape, generator=rng).to(dtype)
    pos = torch.arange(tokens, dtype=torch.int32)
    indices = patterns(tokens, args.block, args.kv_heads, args.density)
    indices = {name: index for name, index in indices.items() if not args.pattern or name in args.pattern}

    def sdpa() -> Tensor:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    plans = {name: prepare(index, q_pos=pos, k_pos=pos) for name, index in indices.items()}
    calls: dict[str, Callable[[], Tensor]] = {"sdpa": sdpa}
    calls |= {
        name: lambda plan=plan: block_sparse_attention(q, k, v, plan)[0] for name, plan in plans.items()
    }
    if args.flex:
        calls |= {f"flex {name}": flex(q, k, v, index, tokens, args.heads) for name, index in indices.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for repeat in range(args.repeats + 1):
        for name, call in calls.items():
            measured = timed(call, dout, (q, k, v))
            # The first round builds the extension, the plans' transposes and the libraries' own kernels.
            if repeat:
                times[name].append(measured)
    medians = {
        name: [statistics.median(side) for side in zip(*pairs, strict=True)] for name, pairs in times.items()
    }
    peaks = {name: peak_bytes(lambda call=call: timed(call, dout, (q, k, v))) for name, call in calls.items()}
    flops = 4 * args.head_size * args.heads * tokens * (tokens + 1) / 2
    rows = []
    for name, (forward_s, backward_s) in medians.items():
        pattern = "dense" if name == "sdpa" else name.removeprefix("flex ")
        density = 1.0 if name == "sdpa" else indices[pattern].density()
        both = not name.startswith("flex ")
        whole = (3.5 if both else 1) * flops * density / (forward_s + backward_s * both)
        sdpa_s = sum(medians["sdpa"]) if both else medians["sdpa"][0]
        held = 0
        if name in plans:
            lists = (plans[name].rows, plans[name].cols)
            held = indices[name].nbytes + sum(
                x.nbytes for part in lists for x in (part.ptr, part.mid, part.ids)
            )
        rows.append(
            {
                "pattern": pattern,
                "kernel": "sdpa" if name == "sdpa" else "block_sparse" if both else "flex (forward)",
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "density": round(density, 4),
                "forward_s": round(forward_s, 4),
                "backward_s": round(backward_s, 4) if both else "",
                "forward_tflop_s": round(flops * density / forward_s / 1e12, 4),
                "backward_tflop_s": round(2.5 * flops * density / backward_s / 1e12, 4) if both else "",
                "rate_of_dense": round(whole / ((3.5 if both else 1) * flops / sdpa_s), 3),
                "speedup_over_sdpa": round(sdpa_s / (forward_s + backward_s * both), 2),
                "index_mib": round(held / 2**20, 3),
                "peak_mib": round(peaks[name] / 2**20, 1),
            }
        )
    return rows


def break_even(rows: Sequence[dict[str, object]]) -> float | None:
    """The density at which attention takes as long as SDPA, interpolated between the measured ones."""
    points = sorted(
        (float(r["density"]), float(r["speedup_over_sdpa"])) for r in rows if r["kernel"] == "block_sparse"
    )
    for (d0, s0), (d1, s1) in pairwise(points):
        if s0 >= 1 > s1:
            # Time, the inverse of the speed-up, is what grows linearly with density.
            return d0 + (d1 - d0) * (1 - 1 / s0) / (1 / s1 - 1 / s0)
    return None


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    groups = sorted({(str(r["dtype"]), int(str(r["tokens"]))) for r in rows})
    for dtype, tokens in groups:
        mine = [r for r in rows if (r["dtype"], r["tokens"], r["kernel"]) == (dtype, tokens, "block_sparse")]
        mine.sort(key=lambda r: float(str(r["density"])))
        axis.plot(
            [r["density"] for r in mine],
            [r["speedup_over_sdpa"] for r in mine],
            "o-",
            label=f"{dtype}, {tokens}",
        )
    low = min(float(str(r["density"])) for r in rows)
    axis.plot([low, 1], [1 / low, 1], "k:", label="1 / density")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="share of the causal blocks kept",
        ylabel="speed-up over dense SDPA",
    )
    axis.grid(True, which="both", alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="ltrain bench attention", description=__doc__.splitlines()[0])
    made.add_argument("--tokens", type=int, nargs="+", default=[4096])
    made.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float64"], default=["float32"])
    made.add_argument("--heads", type=int, default=8)
    made.add_argument("--kv-heads", type=int, default=2)
    made.add_argument("--head-size", type=int, default=64)
    made.add_argument("--block", type=int, default=128)
    made.add_argument("--density", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05])
    made.add_argument("--pattern", nargs="+", help="only these rows of the table, e.g. dense 'random 10%%'")
    made.add_argument("--flex", action="store_true", help="also FlexAttention's forward")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--out", type=Path, default=Path("outputs/bench"))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; print the table, write attention_cpu.csv and attention_cpu.png to --out."""
    args = parser().parse_args(argv)
    if min(*args.tokens, args.heads, args.kv_heads, args.repeats, args.threads, args.block) < 1:
        print("tokens, heads, kv-heads, block, threads and repeats must be at least 1", file=sys.stderr)
        return 2
    if args.heads % args.kv_heads or not all(0 < d <= 1 for d in args.density):
        print("kv-heads must divide heads, densities must lie in (0, 1]", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    kernel = "C++ extension" if extension_loaded() else "PyTorch operations"
    print(f"{platform.machine()}, {args.threads} threads, PyTorch {torch.__version__}, {kernel}")
    rows: list[dict[str, object]] = []
    for dtype in args.dtype:
        for tokens in args.tokens:
            made = bench(args, tokens, getattr(torch, dtype))
            rows += made
            for row in made:
                print("  ".join(f"{name}={row[name]}" for name in FIELDS))
            even = break_even(made)
            at = "above 1" if even is None else round(even, 2)
            print(f"break-even density, {dtype}, {tokens} tokens: {at}")
    with (args.out / "attention_cpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.out / "attention_cpu.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
