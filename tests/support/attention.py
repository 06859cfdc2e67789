"""Masked attention written out in full, for comparison: nothing here is shared with the code under test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Reference:
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def visible_pairs(
    mask: Tensor,
    block: int,
    num_tokens: int,
    doc_ids: Tensor | None,
    batch: int,
    heads: int,
    single_keys: Tensor | None = None,
) -> Tensor:
    """Bool [B, heads, T, T] from a block mask bool [b, h, R, C]: selected, causal, same document.

    single_keys bool [B, h, T] are seen by all later tokens of their document.
    """
    pairs = mask.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :num_tokens, :num_tokens]
    pairs = pairs.repeat_interleave(heads // mask.shape[1], 1).expand(batch, -1, -1, -1)
    if single_keys is not None:
        pairs = pairs | single_keys.repeat_interleave(heads // single_keys.shape[1], 1)[:, :, None, :]
    token = torch.arange(num_tokens)
    pairs = pairs & (token[:, None] >= token[None, :])
    if doc_ids is not None:
        doc = doc_ids.reshape(-1, num_tokens)
        pairs = pairs & (doc[:, None, :, None] == doc[:, None, None, :])
    return pairs


def attention(
    q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, dout: Tensor, dlse: Tensor, scale: float | None = None
) -> Reference:
    """Out, lse and gradients by the textbook; q, k, v [B, T, heads, D], pairs bool [B, Hq, T, T], in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2)) * scale
    scores = scores.masked_fill(~pairs, -torch.inf)
    lse = scores.logsumexp(-1)
    seen = pairs.any(-1)
    weights = torch.exp(scores - torch.where(seen, lse, 0.0)[..., None])
    out = torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(group, 2))
    loss = (out * dout.double()).sum() + (torch.where(seen, lse, 0.0) * dlse.double()).sum()
    dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
    return Reference(out.detach(), lse.detach(), dq, dk, dv)


def relative_error(reference: Tensor, got: Tensor) -> float:
    """Largest difference over the largest magnitude of the reference; infinite entries must match exactly."""
    got = got.to(reference.dtype)
    finite = torch.isfinite(reference)
    if not torch.equal(finite, torch.isfinite(got)):
        return math.inf
    difference = (reference[finite] - got[finite]).abs()
    largest = reference[finite].abs().max() if finite.any() else torch.tensor(1.0)
    return float(difference.max() / largest.clamp(min=1e-300)) if finite.any() else 0.0
