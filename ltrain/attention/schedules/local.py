"""One attention call on this rank, and the streamed merge of its result into what earlier steps gave.

Shape legend: T tokens first, B batch, N query heads, K kv heads, D head size; kernels take [B, T, heads, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltrain.attention.schedules.base import Step, partial_dtype
from ltrain_kernels.block_sparse import attention_backward, attention_forward


class Partials:
    """Running (out, lse) of all steps so far: fp32 (fp64 for fp64 inputs), merged in place."""

    def __init__(self, q_BTND: Tensor, value_dim: int) -> None:
        batch, tokens, heads, _ = q_BTND.shape
        dtype = partial_dtype(q_BTND.dtype)
        self.out = torch.zeros(batch, tokens, heads, value_dim, dtype=dtype, device=q_BTND.device)
        self.lse = torch.full((batch, heads, tokens), -torch.inf, dtype=dtype, device=q_BTND.device)
        self.empty = True

    def add(self, out: Tensor, lse: Tensor) -> None:
        if self.empty:
            self.out, self.lse, self.empty = out, lse, False
            return
        total = torch.logaddexp(self.lse, lse)
        # Rows that have seen no key yet keep weight 0 instead of exp(-inf + inf).
        base = torch.where(torch.isneginf(total), 0.0, total)
        self.out.mul_(torch.exp(self.lse - base).transpose(1, 2)[..., None])
        self.out.addcmul_(out, torch.exp(lse - base).transpose(1, 2)[..., None])
        self.lse = total


def fold(x: Tensor, kv_heads: int) -> Tensor:
    """[B, T, N, D] -> [B x K, T, N / K, D]: kv heads into the batch."""
    batch, tokens, heads, dim = x.shape
    x = x.reshape(batch, tokens, kv_heads, heads // kv_heads, dim).permute(0, 2, 1, 3, 4)
    return x.reshape(batch * kv_heads, tokens, heads // kv_heads, dim)


def unfold(x: Tensor, kv_heads: int) -> Tensor:
    """The inverse of `fold`."""
    folded, tokens, group, dim = x.shape
    x = x.reshape(folded // kv_heads, kv_heads, tokens, group, dim).permute(0, 2, 1, 3, 4)
    return x.reshape(folded // kv_heads, tokens, kv_heads * group, dim)


def forward_step(
    q: Tensor, k_TBKD: Tensor, v_TBKD: Tensor, step: Step, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of q [B, T, N, D] over one step's keys, partial: normalised by this step alone."""
    batch, tokens, heads, _ = q.shape
    kv_heads = k_TBKD.shape[1] // batch
    out, lse = attention_forward(
        fold(q, kv_heads) if step.folded else q,
        k_TBKD.transpose(0, 1),
        v_TBKD.transpose(0, 1),
        step.plan,
        scale=scale,
        out_dtype=partial_dtype(q.dtype),
    )
    return (unfold(out, kv_heads), lse.reshape(batch, heads, tokens)) if step.folded else (out, lse)


def backward_step(
    dout: Tensor,
    q: Tensor,
    k_TBKD: Tensor,
    v_TBKD: Tensor,
    delta: Tensor,
    lse: Tensor,
    step: Step,
    scale: float,
    dq: Tensor,
) -> tuple[Tensor, Tensor]:
    """Adds one step's part to dq [B, T, N, D] and returns its dk, dv [T, B, K, D]; lse merged, delta global
    [B, N, T]."""
    batch, tokens, heads, _ = q.shape
    kv_heads = k_TBKD.shape[1] // batch
    k, v = k_TBKD.transpose(0, 1), v_TBKD.transpose(0, 1)
    dk, dv = (torch.zeros(x.shape, dtype=dq.dtype, device=q.device) for x in (k, v))
    into = dq
    if step.folded:
        q, dout = fold(q, kv_heads), fold(dout, kv_heads)
        delta, lse = (x.reshape(batch * kv_heads, heads // kv_heads, tokens) for x in (delta, lse))
        into = torch.zeros(q.shape, dtype=dq.dtype, device=q.device)
    attention_backward(dout, q, k, v, delta, lse, step.plan, scale=scale, grads=(into, dk, dv))
    if step.folded:
        dq += unfold(into, kv_heads)
    return dk.transpose(0, 1), dv.transpose(0, 1)
