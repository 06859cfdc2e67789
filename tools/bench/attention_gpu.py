"""Checks and times block-sparse attention on one GPU: our Triton kernels beside FlashAttention-2, cuDNN,
FlexAttention.

    python tools/bench/attention_gpu.py --out results/

Needs only `ltrain_kernels` and torch. Checks run first; a cell whose kernel is wrong is reported as wrong.
Results are written after every cell (JSON and CSV), so that an interrupted run keeps what it measured. Rates
count the visible (query, key) pairs: 4 D FLOPs a pair and head forward, 10 D backward.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltrain_kernels.block_sparse import (
    BlockIndex,
    attention_backward,
    attention_delta,
    attention_forward,
    block_sparse_attention,
    dense,
    prepare,
    strided,
)
from ltrain_kernels.block_sparse.plan import Plan
from ltrain_kernels.block_sparse.triton_index import launch_of

DEVICE = "cuda"
HEAD_DIM = 128


@dataclass(frozen=True)
class Cell:
    """One mask on one shape."""

    name: str
    tokens: int
    heads: int
    kv_heads: int
    block: int
    kept: float | None = None  # share of causal blocks of random lists per kv head; None: closed form
    stride: int = 0
    local: int = 0


CELLS = (
    Cell("dense", 32768, 16, 16, 128),
    Cell("random 90%", 32768, 16, 16, 128, kept=0.10),
    Cell("random 95%", 32768, 16, 16, 128, kept=0.05),
    Cell("random 90% 64x64", 32768, 16, 16, 64, kept=0.10),
    Cell("dense", 32768, 32, 8, 128),
    Cell("random 90%", 32768, 32, 8, 128, kept=0.10),
    Cell("random 95%", 32768, 32, 8, 128, kept=0.05),
    Cell("random 90% 64x64", 32768, 32, 8, 64, kept=0.10),
    Cell("S2 L8 v32", 131072, 32, 8, 64, stride=32, local=8),
)

# Only its index is built.
MILLION = Cell("S2 L8 v32", 1 << 20, 32, 8, 64, stride=32, local=8)


def causal_random(heads: int, blocks: int, kept: float, seed: int = 0) -> Tensor:
    """Bool [1, heads, blocks, blocks]: each causal block with probability `kept`, and the diagonal."""
    gen = torch.Generator(DEVICE).manual_seed(seed)
    mask = torch.rand(1, heads, blocks, blocks, generator=gen, device=DEVICE) < kept
    eye = torch.eye(blocks, dtype=torch.bool, device=DEVICE)
    return (mask | eye) & torch.ones_like(eye).tril()


def make_index(cell: Cell) -> BlockIndex:
    if cell.kept is not None:
        mask = causal_random(cell.kv_heads, cell.tokens // cell.block, cell.kept)
        return BlockIndex.from_mask(mask, cell.block, cell.block)
    if cell.stride:
        residues = [(-h) % cell.stride for h in range(cell.kv_heads)]
        return strided(cell.tokens, cell.block, local=cell.local, stride=cell.stride, residues=residues).to(
            DEVICE
        )
    return dense(cell.tokens, cell.block).to(DEVICE)


def visible_pairs(cell: Cell, index: BlockIndex) -> int:
    """Visible (query, key) pairs over all query heads: whole blocks, and half of the diagonal ones."""
    blocks = cell.tokens // cell.block
    diagonal = blocks * cell.block * (cell.block - 1) // 2
    per_list = cell.block**2 * index.nnz - index.heads * diagonal
    return per_list * cell.heads // index.heads


def tensors(
    cell: Cell, seed: int = 1, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout as [1, T, H, D]."""
    torch.manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(1, cell.tokens, heads, HEAD_DIM, device=DEVICE, dtype=dtype)

    return draw(cell.heads), draw(cell.kv_heads), draw(cell.kv_heads), draw(cell.heads)


def median_ms(call: Callable[[], Any], repeats: int = 11, warmup: int = 3) -> float:
    """Median time of a call on the GPU, of 5 calls where one takes longer than 0.1 s. All calls are queued
    before the first is waited for, so that the host's part of a launch is hidden, as in training; a write of
    256 MB before each clears the second-level cache."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    if time.perf_counter() - start > 0.1:
        repeats, warmup = min(repeats, 5), 2
    for _ in range(warmup - 2):
        call()
    flush = torch.empty(64 << 20, dtype=torch.int32, device=DEVICE)
    marks = []
    torch.cuda.synchronize()
    for _ in range(repeats):
        flush.zero_()
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        call()
        after.record()
        marks.append((before, after))
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in marks)


def own_calls(cell: Cell, plan: Plan) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward and backward (with its delta) of our kernels."""
    q, k, v, dout = tensors(cell)
    out, lse = attention_forward(q, k, v, plan, backend="triton")

    def backward() -> Any:
        delta = attention_delta(out, dout)
        return attention_backward(dout, q, k, v, delta, lse, plan, backend="triton")

    return lambda: attention_forward(q, k, v, plan, backend="triton"), backward


def autograd_calls(cell: Cell, attend: Callable[[Tensor, Tensor, Tensor], Tensor]):
    """Forward and backward of a differentiable function of [1, H, T, D] tensors."""
    q, k, v, dout = (x.transpose(1, 2).contiguous() for x in tensors(cell))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return (lambda: attend(*leaves)), (lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))


def sdpa(backend: SDPBackend, gqa: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

    return attend


def flex(cell: Cell, index: BlockIndex) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention over the same blocks; its tables are made from ours (its own mask builder needs T x T
    bytes)."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    mask = index.to_mask().expand(-1, cell.kv_heads, -1, -1).repeat_interleave(cell.heads // cell.kv_heads, 1)
    if index.heads == 1:
        mask = mask[:, :1]
    eye = torch.eye(mask.shape[-1], dtype=torch.bool, device=DEVICE)

    def table(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(-1).int(), x.int().argsort(dim=-1, descending=True, stable=True).int()

    partial, full = table(mask & eye), table(mask & ~eye)
    block_mask = BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=(cell.block, cell.block), mask_mod=lambda b, h, i, j: i >= j,
        seq_lengths=(cell.tokens, cell.tokens),
    )  # fmt: skip
    options = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 64, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 64}
    kernel_options = options if cell.block < 128 else None
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = cell.heads != cell.kv_heads
    return lambda q, k, v: compiled(
        q, k, v, block_mask=block_mask, enable_gqa=gqa, kernel_options=kernel_options
    )  # fmt: skip


def compile_flex(number: int) -> None:
    """Fill the compiler's cache on disk with what FlexAttention needs for one of CELLS."""
    cell = CELLS[number]
    forward, backward = autograd_calls(cell, flex(cell, make_index(cell)))
    forward()
    backward()


@dataclass
class Row:
    cell: str
    tokens: int
    heads: str
    kernel: str
    density: float
    forward_ms: float | None = None
    backward_ms: float | None = None
    forward_tflops: float | None = None
    backward_tflops: float | None = None
    plan_mib: float | None = None
    index_s: float | None = None
    error: str = ""


class Results:
    """Rows, rewritten to disk after each one."""

    def __init__(self, out: Path, facts: dict[str, Any]) -> None:
        self.out, self.facts, self.rows, self.checks = out, facts, [], []
        out.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        shown = [f"{x:9.3f}" if isinstance(x, float) else str(x) for x in asdict(row).values()]
        print(" ".join(shown), flush=True)
        self.write()

    def write(self) -> None:
        data = {"facts": self.facts, "checks": self.checks, "rows": [asdict(row) for row in self.rows]}
        (self.out / "attention_gpu.json").write_text(json.dumps(data, indent=1))
        with (self.out / "attention_gpu.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, asdict(self.rows[0]).keys() if self.rows else [])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)


def build(cell: Cell) -> tuple[BlockIndex, Plan, float, float]:
    """Index and plan of a cell, made ready for both directions; the MiB that they take, and the seconds."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    index = make_index(cell)
    pos = torch.arange(cell.tokens, dtype=torch.int32, device=DEVICE)
    plan = prepare(index, q_pos=pos, k_pos=pos)
    launch = launch_of(plan, 1, cell.heads, cell.kv_heads, 4 * HEAD_DIM)
    torch.cuda.synchronize()
    return index, plan, (launch.nbytes + index.nbytes) / 2**20, time.perf_counter() - start


def time_cell(cell: Cell, kernels: list[str], results: Results) -> None:
    index, plan, plan_mib, index_s = build(cell)
    blocks = cell.tokens // cell.block
    density = index.nnz / (index.heads * blocks * (blocks + 1) // 2)
    gqa = cell.heads != cell.kv_heads
    for kernel in kernels:
        pairs = visible_pairs(cell, index)
        row = Row(cell.name, cell.tokens, f"{cell.heads}:{cell.kv_heads}", kernel, density)
        try:
            if kernel == "ltrain":
                row.plan_mib, row.index_s = plan_mib, index_s
                forward, backward = own_calls(cell, plan)
            elif kernel == "flex":
                forward, backward = autograd_calls(cell, flex(cell, index))
            else:
                # These know only the dense causal mask.
                pairs, row.density = cell.heads * cell.tokens * (cell.tokens + 1) // 2, 1.0
                backend = SDPBackend.FLASH_ATTENTION if kernel == "fa2" else SDPBackend.CUDNN_ATTENTION
                forward, backward = autograd_calls(cell, sdpa(backend, gqa))
            row.forward_ms = median_ms(forward)
            row.forward_tflops = 4 * HEAD_DIM * pairs / row.forward_ms / 1e9
            row.backward_ms = median_ms(backward)
            row.backward_tflops = 10 * HEAD_DIM * pairs / row.backward_ms / 1e9
        except Exception as problem:  # a baseline that can't run this cell is a result
            row.error = f"{type(problem).__name__}: {problem}".replace("\n", " ")[:300]
        results.add(row)
        torch.cuda.empty_cache()


def relative(got: Tensor, want: Tensor) -> float:
    finite = torch.isfinite(want)
    if not torch.equal(torch.isfinite(got), finite):
        return float("inf")
    return float(
        (got.double() - want.double())[finite].norm() / want.double()[finite].norm().clamp(min=1e-12)
    )


# (dtype, head size, query heads, kv heads, block, form) of the checks against the definition, at 1,000
# tokens. "packed": key blocks of 64, so that the heads of a group share a tile of 64 rows.
CHECKS = (
    (torch.bfloat16, 128, 2, 2, 128, "lists"),
    (torch.bfloat16, 128, 8, 2, 64, "lists"),
    (torch.bfloat16, 128, 4, 2, 32, "lists per query head"),
    (torch.bfloat16, 128, 4, 2, 64, "lists per query head"),
    (torch.bfloat16, 128, 4, 2, 32, "packed lists"),
    (torch.bfloat16, 128, 2, 2, 128, "closed"),
    (torch.bfloat16, 128, 8, 2, 64, "closed"),
    (torch.bfloat16, 128, 4, 2, 128, "documents"),
    (torch.bfloat16, 64, 8, 2, 64, "lists"),
    (torch.bfloat16, 64, 4, 1, 16, "closed documents"),
    (torch.float16, 96, 4, 2, 128, "lists"),
    (torch.float16, 64, 2, 2, 64, "documents"),
    (torch.float32, 64, 4, 2, 64, "lists"),
    (torch.float32, 128, 2, 1, 128, "closed documents"),
)
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}


def check_definition(number: int) -> dict[str, Any]:
    """out, lse, dq, dk, dv (with a gradient of lse) of one of CHECKS against fp64; a second run must be
    bitwise equal."""
    dtype, dim, heads, kv_heads, block, form = CHECKS[number]
    torch.manual_seed(number)
    tokens = 1000
    block_k = 64 if "packed" in form else block
    blocks = -(-tokens // block), -(-tokens // block_k)
    qkv = [torch.randn(2, tokens, n, dim, device=DEVICE).to(dtype) for n in (heads, kv_heads, kv_heads)]
    dout = torch.randn(2, tokens, heads, dim, device=DEVICE).to(dtype)
    dlse = torch.randn(2, heads, tokens, device=DEVICE)
    if "closed" in form:
        residues = [h % 3 for h in range(kv_heads)]
        index: BlockIndex = strided(tokens, block, local=2, stride=3, residues=residues, sinks=1).to(DEVICE)
    else:
        mask = torch.rand(1, heads if "query" in form else kv_heads, *blocks, device=DEVICE) < 0.5
        mask[:, :, 2] = False
        index = BlockIndex.from_mask(mask, block, block_k)
    pos = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
    call: dict[str, Any] = {"q_pos": pos, "k_pos": pos}
    if "documents" in form:
        doc = (pos >= 333).int() + (pos >= 700).int()
        call |= {"q_doc": doc, "k_doc": doc, "window": 300}

    def grads(backend: str, leaves: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        out, lse = block_sparse_attention(*leaves, index, **call, backend=backend)
        loss = (out * dout.to(out.dtype)).sum() + (torch.where(torch.isinf(lse), 0.0, lse) * dlse).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]

    want = grads("reference", [x.double() for x in qkv])
    got, again = grads("triton", qkv), grads("triton", qkv)
    errors = [relative(g, w) for g, w in zip(got, want, strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return {
        "dtype": str(dtype), "dim": dim, "heads": f"{heads}:{kv_heads}", "block": block, "form": form,
        "errors": errors, "bitwise_repeat": same, "ok": max(errors) < LIMITS[dtype] and same,
    }  # fmt: skip


def run_checks(results: Results, with_flex: bool) -> None:
    """The small checks, many at a time because compiling takes most of them, and what FlexAttention compiles
    beside them; then the long cells against SDPA."""
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        # What doesn't compile is reported by its cell.
        warming = [pool.submit(compile_flex, n) for n in range(len(CELLS)) if with_flex]
        for number, future in enumerate([pool.submit(check_definition, n) for n in range(len(CHECKS))]):
            try:
                results.checks.append(future.result())
            except Exception as problem:
                results.checks.append(
                    {"form": str(CHECKS[number]), "ok": False, "errors": [repr(problem)[:300]]}
                )
            if not results.checks[-1]["ok"]:
                print("WRONG", results.checks[-1], flush=True)
        wait(warming)
    for cell in CELLS[0], CELLS[4]:
        pos = torch.arange(cell.tokens, dtype=torch.int32, device=DEVICE)
        plan = prepare(make_index(cell), q_pos=pos, k_pos=pos)
        q, k, v, dout = tensors(cell)
        out, lse = attention_forward(q, k, v, plan, backend="triton")
        got = attention_backward(dout, q, k, v, attention_delta(out, dout), lse, plan, backend="triton")
        leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
        want_out = sdpa(SDPBackend.FLASH_ATTENTION, cell.heads != cell.kv_heads)(*leaves)
        want = torch.autograd.grad(want_out, leaves, dout.transpose(1, 2))
        errors = [relative(a, b.transpose(1, 2)) for a, b in zip((out, *got), (want_out, *want), strict=True)]
        check = {
            "form": f"{cell.name} 32K against SDPA",
            "heads": f"{cell.heads}:{cell.kv_heads}",
            "errors": errors,
        }
        results.checks.append(check | {"ok": max(errors) < 1e-2})
        print(results.checks[-1], flush=True)
        torch.cuda.empty_cache()
    results.write()
    print(f"checks: {sum(c['ok'] for c in results.checks)} of {len(results.checks)} right", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for attention_gpu.json and .csv")
    parser.add_argument("--kernels", nargs="+", default=["ltrain", "fa2", "cudnn", "flex"])
    parser.add_argument("--commit", default="", help="commit of the kernels, written into the results")
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--seconds", type=float, default=480, help="start no new cell after this long")
    args = parser.parse_args()
    start = time.perf_counter()
    facts = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(), "commit": args.commit,
    }  # fmt: skip
    _, _, facts["million_token_index_mib"], facts["million_token_index_s"] = build(MILLION)
    print(facts, flush=True)
    results = Results(args.out, facts)
    if not args.skip_checks:
        run_checks(results, "flex" in args.kernels)
    for cell in CELLS:
        kernels = [
            k for k in args.kernels if k not in ("fa2", "cudnn") or cell.name == "dense" or cell.stride
        ]
        if time.perf_counter() - start < args.seconds:
            time_cell(cell, kernels, results)


if __name__ == "__main__":
    main()
