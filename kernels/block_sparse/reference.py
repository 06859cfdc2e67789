"""Block-sparse attention from its definition: a token-level mask, a softmax over what it leaves, a product.

For tests and small sizes: one [Tq, Tk] score matrix per (batch, query head). Any floating dtype; half
precisions are computed in fp32. Autograd differentiates it as it stands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ltrain_kernels.block_sparse.plan import Plan


def visible_tokens(plan: Plan, selected: Tensor, b: int) -> Tensor:
    """Bool [Tq, Tk]: block selected (bool [R, C]), key not after query, same document, within the window."""
    tq, tk = plan.num_tokens
    blocks = selected.repeat_interleave(plan.index.block_q, 0).repeat_interleave(plan.index.block_k, 1)
    q_pos, k_pos = _row(plan.q_pos, b)[:, None], _row(plan.k_pos, b)[None, :]
    mask = blocks[:tq, :tk] & (k_pos <= q_pos)
    if plan.q_doc is not None and plan.k_doc is not None:
        mask &= _row(plan.q_doc, b)[:, None] == _row(plan.k_doc, b)[None, :]
    if plan.window is not None:
        mask &= q_pos - k_pos < plan.window
    return mask


def reference_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, Tq, Hq, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv] -> out [B, Tq, Hq, Dv], lse [B, Hq, Tq].

    A query that sees no key has out 0, lse -inf and no gradient. out has q's dtype, lse is fp32 (fp64 for
    fp64 inputs).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    selected = plan.index.to_mask()
    outs, lses = [], []
    for b in range(q.shape[0]):
        for h in range(heads):
            mask = visible_tokens(plan, selected[_at(selected.shape[0], b), h * plan.index.heads // heads], b)
            scores = (q[b, :, h].to(dtype) @ k[b, :, h // group].to(dtype).T) * scale
            scores = scores.masked_fill(~mask, float("-inf"))
            seen = mask.any(-1, keepdim=True)
            # Rows without keys go through the softmax as zeros, then become 0 and -inf: no nan, no gradient.
            lse = torch.logsumexp(torch.where(seen, scores, 0.0), -1, keepdim=True)
            weights = torch.where(seen, torch.exp(scores - lse), 0.0)
            outs.append(weights @ v[b, :, h // group].to(dtype))
            lses.append(torch.where(seen, lse, float("-inf"))[:, 0])
    shape = (q.shape[0], heads, q.shape[1])
    out = torch.stack(outs).view(*shape, v.shape[3]) if outs else q.new_zeros(*shape, v.shape[3])
    lse = torch.stack(lses).view(shape) if lses else q.new_zeros(shape, dtype=dtype)
    return out.transpose(1, 2).contiguous().to(q.dtype), lse


def reference_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one (possibly partial) call, in fp32 (fp64), given the lse and delta of the whole row:

    P = exp(S - lse) where visible, dS = P (dout v' - delta), dq = scale dS k, dk = scale dS' q, dv = P' dout
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    selected = plan.index.to_mask()
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    for b in range(q.shape[0]):
        for h in range(heads):
            mask = visible_tokens(plan, selected[_at(selected.shape[0], b), h * plan.index.heads // heads], b)
            q_, k_, v_ = q[b, :, h].to(dtype), k[b, :, h // group].to(dtype), v[b, :, h // group].to(dtype)
            dout_, lse_ = dout[b, :, h].to(dtype), lse[b, h].to(dtype)[:, None]
            weights = torch.where(mask, torch.exp(q_ @ k_.T * scale - lse_), 0.0)
            dscores = torch.where(mask, weights * (dout_ @ v_.T - delta[b, h].to(dtype)[:, None]), 0.0)
            dq[b, :, h] += scale * (dscores @ k_)
            dk[b, :, h // group] += scale * (dscores.T @ q_)
            dv[b, :, h // group] += weights.T @ dout_
    return dq, dk, dv


def _row(x: Tensor, b: int) -> Tensor:
    return x[_at(x.shape[0], b)]


def _at(size: int, b: int) -> int:
    return b if size > 1 else 0
