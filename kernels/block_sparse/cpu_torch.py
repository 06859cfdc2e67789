"""Block-sparse attention with plain PyTorch operations: what runs where no compiler is at hand.

Work in proportion to the selected blocks: a loop over (batch, index head, row) in the forward and for dQ,
over (batch, index head, column) for dK/dV, each list taken in chunks. No atomics: bitwise deterministic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ltrain_kernels.block_sparse.plan import Lists, Plan

# Blocks gathered at a time: enough to keep a matrix product busy, small beside the sequence.
CHUNK = 16


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """out [B, Tq, Hq, Dv] in `out_dtype`, lse [B, Hq, Tq] fp32 (fp64 for fp64 inputs)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, tq, heads, _ = q.shape
    out = torch.zeros(batch, tq, heads, v.shape[3], dtype=out_dtype)
    lse = torch.full((batch, heads, tq), float("-inf"), dtype=dtype)
    for b, h, kv_head, i, chunks in _walk(plan, plan.rows, q, k, plan.index.block_k):
        rows = slice(i * plan.index.block_q, min((i + 1) * plan.index.block_q, tq))
        q_GMD = q[b, rows, h].to(dtype).transpose(0, 1) * scale
        top = q_GMD.new_full(q_GMD.shape[:2], float("-inf"))
        total, acc = torch.zeros_like(top), q_GMD.new_zeros(*q_GMD.shape[:2], v.shape[3])
        for tokens, partial in chunks:
            scores = q_GMD @ k[b, tokens, kv_head].to(dtype).T
            if partial:
                scores = scores.masked_fill(~_visible(plan, b, rows, tokens), float("-inf"))
            new = torch.maximum(top, scores.amax(-1))
            safe = torch.where(torch.isinf(new), 0.0, new)
            weights = torch.exp(scores - safe[..., None])
            old = torch.exp(top - safe)
            total = total * old + weights.sum(-1)
            acc = acc * old[..., None] + weights @ v[b, tokens, kv_head].to(dtype)
            top = new
        seen = total > 0
        acc = acc / torch.where(seen, total, 1.0)[..., None]
        out[b, rows, h] = acc.transpose(0, 1).to(out_dtype)
        lse[b, h, rows] = torch.where(seen, torch.log(total) + top, float("-inf"))
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
    *,
    accumulate: bool,
) -> None:
    """Write dq, dk, dv of this call to `grads` (add to them if `accumulate`), given the lse and delta of the
    whole rows [B, Hq, Tq].
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = grads
    if not accumulate:
        for grad in grads:
            grad.zero_()
    tq, tk = q.shape[1], k.shape[1]
    # Where a row sees nothing in the whole call, exp(S - inf) is 0 as it must be.
    lse = torch.where(torch.isinf(lse), float("inf"), lse).to(dtype)
    delta = delta.to(dtype)
    for b, h, kv_head, i, chunks in _walk(plan, plan.rows, q, k, plan.index.block_k):
        rows = slice(i * plan.index.block_q, min((i + 1) * plan.index.block_q, tq))
        q_GMD, dout_GMD = (x[b, rows, h].to(dtype).transpose(0, 1) for x in (q, dout))
        acc = torch.zeros_like(q_GMD)
        for tokens, partial in chunks:
            k_ND, v_ND = k[b, tokens, kv_head].to(dtype), v[b, tokens, kv_head].to(dtype)
            weights = torch.exp(q_GMD @ k_ND.T * scale - lse[b, h, rows][..., None])
            dscores = weights * (dout_GMD @ v_ND.T - delta[b, h, rows][..., None])
            if partial:
                dscores = torch.where(_visible(plan, b, rows, tokens), dscores, 0.0)
            acc += dscores @ k_ND
        dq[b, rows, h] += (acc * scale).transpose(0, 1).to(dq.dtype)
    for b, h, kv_head, j, chunks in _walk(plan, plan.cols, q, k, plan.index.block_q):
        cols = slice(j * plan.index.block_k, min((j + 1) * plan.index.block_k, tk))
        k_ND, v_ND = k[b, cols, kv_head].to(dtype), v[b, cols, kv_head].to(dtype)
        dk_ND, dv_ND = torch.zeros_like(k_ND), torch.zeros_like(v_ND)
        for tokens, partial in chunks:
            q_GMD, dout_GMD = (x[b, tokens, h].to(dtype).transpose(0, 1) for x in (q, dout))
            weights = torch.exp(q_GMD @ k_ND.T * scale - lse[b, h][:, tokens][..., None])
            dscores = weights * (dout_GMD @ v_ND.T - delta[b, h][:, tokens][..., None])
            if partial:
                seen = _visible(plan, b, tokens, cols)
                weights, dscores = (torch.where(seen, x, 0.0) for x in (weights, dscores))
            dv_ND += (weights.transpose(1, 2) @ dout_GMD).sum(0)
            dk_ND += (dscores.transpose(1, 2) @ q_GMD).sum(0)
        dk[b, cols, kv_head] += (dk_ND * scale).to(dk.dtype)
        dv[b, cols, kv_head] += dv_ND.to(dv.dtype)


def _walk(
    plan: Plan, lists: Lists, q: Tensor, k: Tensor, block: int
) -> Iterator[tuple[int, slice, int, int, list[tuple[slice | Tensor, bool]]]]:
    """Every non-empty list: (batch, the query heads that share it and a key/value head, that head, list
    number, its tokens in chunks with a flag for those that need a mask).
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    tokens = k.shape[1] if lists is plan.rows else q.shape[1]
    shared = min(heads // plan.index.heads, heads // kv_heads)
    for b in range(q.shape[0]):
        plane = b if plan.batch > 1 else 0
        for first in range(0, heads, shared):
            index_head = first * plan.index.heads // heads
            ptr, mid = lists.ptr[plane, index_head].tolist(), lists.mid[plane, index_head].tolist()
            for i in range(len(mid)):
                if ptr[i] == ptr[i + 1]:
                    continue
                chunks: list[tuple[slice | Tensor, bool]] = []
                for low, high, partial in ((ptr[i], mid[i], False), (mid[i], ptr[i + 1], True)):
                    for at in range(low, high, CHUNK):
                        ids = lists.ids[at : min(at + CHUNK, high)]
                        chunks.append((_token_ids(ids, block, tokens), partial))
                yield b, slice(first, first + shared), first * kv_heads // heads, i, chunks


def _token_ids(ids: Tensor, block: int, tokens: int) -> slice | Tensor:
    first, last = int(ids[0]), int(ids[-1])
    if last - first + 1 == len(ids):
        return slice(first * block, min((last + 1) * block, tokens))
    at = (ids[:, None].to(torch.int64) * block + torch.arange(block)).reshape(-1)
    return at[at < tokens]


def _visible(plan: Plan, b: int, rows: slice | Tensor, cols: slice | Tensor) -> Tensor:
    def at(x: Tensor, tokens: slice | Tensor) -> Tensor:
        return x[b if x.shape[0] > 1 else 0, tokens]

    q_pos, k_pos = at(plan.q_pos, rows)[:, None], at(plan.k_pos, cols)[None, :]
    mask = k_pos <= q_pos
    if plan.q_doc is not None and plan.k_doc is not None:
        mask &= at(plan.q_doc, rows)[:, None] == at(plan.k_doc, cols)[None, :]
    if plan.window is not None:
        mask &= q_pos - k_pos < plan.window
    return mask
