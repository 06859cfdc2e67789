"""Runs the Triton kernels in the interpreter and prints, as JSON, their errors against the fp64 definition.

A program of its own, because a process either interprets its kernels or compiles them.
`test_triton_interpreter` starts it with TRITON_INTERPRET=1 and judges what it prints.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from ltrain_kernels.block_sparse import (
    BlockIndex,
    attention_backward,
    attention_delta,
    attention_forward,
    block_sparse_attention,
    prepare,
    strided,
)
from ltrain_kernels.lse_merge import merge

VISITS = [0.0]


@dataclass(frozen=True)
class Case:
    """Shapes of one check. `index`: 'random' (lists), 'closed' (S2 with a sink), 'rows' (some rows empty)."""

    tq: int = 96
    tk: int = 96
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    value_dim: int = 16
    block_q: int = 32
    block_k: int = 32
    batch: int = 1
    index: str = "random"
    index_heads: int = 1
    index_batch: int = 1
    docs: bool = False
    window: int | None = None
    offset: int = 0
    shuffled: bool = False
    dtype: torch.dtype = torch.float32
    strided_input: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(),
    "ragged": Case(tq=75, tk=75, heads=1, index_heads=1),
    "gqa_packed": Case(heads=4, kv_heads=2, block_q=16, index_heads=2, tq=64, tk=64, dim=32, value_dim=32),
    "gqa_odd_group": Case(heads=3, kv_heads=1),
    "per_query_head": Case(heads=4, kv_heads=2, index_heads=4, tq=64, tk=64),
    "value_dim": Case(dim=24, value_dim=40),
    "rectangular": Case(tq=48, tk=112, offset=64),
    "block_shapes": Case(tq=128, tk=128, block_q=64, block_k=16, heads=1),
    "documents": Case(docs=True, batch=2, tq=80, tk=80),
    "window": Case(window=20, heads=1),
    "batched_index": Case(batch=2, index_batch=2, tq=64, tk=64),
    "shuffled_positions": Case(shuffled=True, heads=1),
    "empty_rows": Case(index="rows", offset=-40, heads=1),
    "closed": Case(index="closed", index_heads=2, heads=4, kv_heads=2, tq=160, tk=160, block_q=16,
    block_k=16),
    "closed_documents": Case(index="closed", docs=True, batch=2, heads=1, tq=90, tk=90, block_q=16,
    block_k=16),
    "closed_window": Case(index="closed", window=50, heads=1, tq=120, tk=120, block_q=16, block_k=16),
    "closed_shuffled": Case(index="closed", shuffled=True, heads=1, block_q=16, block_k=16),
    "strided_input": Case(strided_input=True, heads=1),
    "fp16": Case(dtype=torch.float16, heads=1),
    "bf16": Case(dtype=torch.bfloat16, heads=1),
}  # fmt: skip


def inputs(case: Case, seed: int) -> tuple[list[Tensor], BlockIndex, dict[str, Any]]:
    """q, k, v in fp64 (values of the case's dtype), the index, and the call's other arguments."""
    gen = torch.Generator().manual_seed(seed)

    def tensor(tokens: int, heads: int, dim: int) -> Tensor:
        x = torch.randn(case.batch, tokens, heads, dim, generator=gen, dtype=torch.float64)
        return x.to(case.dtype).double()

    qkv = [
        tensor(case.tq, case.heads, case.dim),
        tensor(case.tk, case.kv_heads, case.dim),
        tensor(case.tk, case.kv_heads, case.value_dim),
    ]
    rows, cols = -(-case.tq // case.block_q), -(-case.tk // case.block_k)
    if case.index == "closed":
        residues = [(-h) % 3 for h in range(case.index_heads)]
        index: BlockIndex = strided(case.tq, case.block_q, local=2, stride=3, residues=residues, sinks=1)
    else:
        mask = torch.rand(case.index_batch, case.index_heads, rows, cols, generator=gen) < 0.7
        if case.index == "rows":
            mask[:, :, 1] = False
        index = BlockIndex.from_mask(mask, case.block_q, case.block_k)
    q_pos = torch.arange(case.tq, dtype=torch.int32) + case.offset
    k_pos = torch.arange(case.tk, dtype=torch.int32)
    if case.shuffled:
        q_pos = k_pos = torch.randperm(case.tq, generator=gen).int()
    call: dict[str, Any] = {"q_pos": q_pos, "k_pos": k_pos, "window": case.window}
    if case.docs:
        cuts = torch.randint(10, case.tq - 10, (case.batch, 2), generator=gen).sort(-1).values
        doc = (torch.arange(case.tq) >= cuts[:, :, None]).sum(1).int()
        call |= {"q_doc": doc, "k_doc": doc}
    return qkv, index, call


def error(got: Tensor, want: Tensor) -> float:
    """Greatest error over greatest value; rows of -inf must agree."""
    infinite = torch.isinf(want)
    if not torch.equal(torch.isinf(got), infinite):
        return float("inf")
    got, want = got.double()[~infinite], want[~infinite]
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-6)) if got.numel() else 0.0


def gradients(
    tensors: list[Tensor], index: BlockIndex, call: dict[str, Any], dout: Tensor, dlse: Tensor, backend: str
):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = block_sparse_attention(*leaves, index, **call, backend=backend)
    finite = torch.where(torch.isinf(lse), 0.0, lse)
    loss = (out.to(dout.dtype) * dout).sum() + (finite.to(dlse.dtype) * dlse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def check(case: Case, seed: int) -> dict[str, float]:
    qkv, index, call = inputs(case, seed)
    gen = torch.Generator().manual_seed(seed + 1)
    dout = torch.randn(case.batch, case.tq, case.heads, case.value_dim, generator=gen, dtype=torch.float64)
    dout = dout.to(case.dtype).double()
    dlse = torch.randn(case.batch, case.heads, case.tq, generator=gen, dtype=torch.float64)
    want = gradients(qkv, index, call, dout, dlse, "reference")
    own = [x.to(case.dtype) for x in qkv]
    if case.strided_input:
        # Not aligned for the bulk copy engine: these go through pointers.
        own = [torch.stack([x, x], -1).flatten(-2)[..., ::2] if i == 0 else x for i, x in enumerate(own)]
        own[1] = torch.cat([own[1], own[1][..., :3]], -1)[..., : case.dim]
    got = gradients(own, index, call, dout.to(case.dtype), dlse.float(), "triton")
    again = gradients(own, index, call, dout.to(case.dtype), dlse.float(), "triton")
    errors = {
        name: error(g, w) for name, g, w in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True)
    }
    errors["repeat"] = max(float((a - b).nan_to_num().abs().max()) for a, b in zip(got, again, strict=True))
    return errors


def check_ring() -> dict[str, float]:
    """Two partial calls over halves of the keys, merged, and their backward into fp32 buffers."""
    case = Case(heads=2, kv_heads=1, tq=64, tk=64)
    (q, k, v), index, call = inputs(case, 7)
    dout = torch.randn(1, 64, 2, 16, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    want = gradients([q, k, v], index, call, dout, torch.zeros(1, 2, 64, dtype=torch.float64), "reference")
    q, k, v, dout = (x.float() for x in (q, k, v, dout))
    rows = torch.arange(2)
    parts = []
    for half in range(2):
        at = slice(32 * half, 32 * half + 32)
        plan = prepare(index.select(rows, torch.tensor([half])), q_pos=call["q_pos"], k_pos=call["k_pos"][at])
        parts.append((k[:, at], v[:, at], plan, at))
    partial = [
        attention_forward(q, k_, v_, plan, backend="triton", out_dtype=torch.float32)
        for k_, v_, plan, _ in parts
    ]
    out, lse = merge(partial)
    delta = attention_delta(out, dout)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for k_, v_, plan, at in parts:
        grads = (dq, dk[:, at], dv[:, at])
        attention_backward(dout, q, k_, v_, delta, lse, plan, backend="triton", grads=grads)
    got = [out, lse, dq, dk, dv]
    return {name: error(g, w) for name, g, w in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True)}


def check_no_keys() -> dict[str, float]:
    """A call with no keys at all, and one with no queries."""
    index = BlockIndex.from_mask(torch.zeros(1, 1, 2, 0, dtype=torch.bool), 16, 16)
    q, k = torch.randn(1, 32, 2, 16), torch.zeros(1, 0, 1, 16)
    pos = torch.arange(32, dtype=torch.int32)
    out, lse = block_sparse_attention(q, k, k, index, q_pos=pos, k_pos=pos[:0], backend="triton")
    none = BlockIndex.from_mask(torch.zeros(1, 1, 0, 2, dtype=torch.bool), 16, 16)
    empty, _ = block_sparse_attention(q[:, :0], q, q, none, q_pos=pos[:0], k_pos=pos, backend="triton")
    return {
        "out": float(out.abs().max()),
        "lse": float((lse != -torch.inf).sum()),
        "shape": float(empty.numel()),
    }


def count_dots() -> None:
    """Count products of tiles: every tile visit makes 2 (forward), 3 (dQ) or 4 (dK/dV) of them."""
    original = InterpreterBuilder.create_dot

    def counted(self, *args, **kwargs):
        VISITS[0] += 1 / 3
        return original(self, *args, **kwargs)

    InterpreterBuilder.create_dot = counted


def main() -> None:
    count_dots()
    names = sys.argv[1:] or list(CASES)
    torch.set_num_threads(1)
    result = {name: check(CASES[name], seed) for seed, name in enumerate(names)}
    if not sys.argv[1:]:
        result |= {"ring": check_ring(), "no_keys": check_no_keys()}
    result["tile_visits"] = {"total": VISITS[0]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
