"""Scores of block pairs by tile maximum, without a T x T matrix."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ltrain_kernels.block_scores import reference
from ltrain_kernels.errors import require

Backend = Literal["auto", "reference", "cpu", "triton"]


@torch.no_grad()
def block_scores(
    q: Tensor,
    k: Tensor,
    block: int,
    *,
    causal: bool = False,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """I_mn = max over queries i of block m and keys j of block n of mean_heads relu(scale q_i . k_j).

    q [B, T, Hq, D], k [B, T, Hkv, D] with Hkv dividing Hq; T need not be a multiple of `block`. `causal`
    leaves out pairs with j > i. Returns fp32 [B, ceil(T / block), ceil(T / block)]; memory beside it is
    block x T a head on the CPU, a tile on a GPU. No gradient. After arXiv 2501.09767, equations 1 and 2.
    Raises ArgumentError on shapes that don't fit.
    """
    require(q.dim() == 4 and k.dim() == 4, "q, k", (q.dim(), k.dim()), "must be [B, T, H, D]")
    require(
        q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3],
        "k.shape",
        tuple(k.shape),
        f"must agree with q's {tuple(q.shape)} in B, T and D",
    )
    require(
        k.shape[2] > 0 and q.shape[2] % k.shape[2] == 0,
        "k.shape[2]",
        k.shape[2],
        f"must divide the {q.shape[2]} query heads",
    )
    require(block >= 1, "block", block, "must be at least 1")
    require(scale > 0, "scale", scale, "must be positive")
    chosen = backend
    if backend == "auto":
        fits = q.is_cuda and block >= 16 and block & (block - 1) == 0 and q.dtype != torch.float64
        chosen = "triton" if fits else "cpu"
    if chosen == "reference":
        return reference.block_scores(q, k, block, causal=causal, scale=scale)
    if chosen == "triton":
        return _triton().block_scores(q, k, block, causal=causal, scale=scale)
    return _by_rows(q, k, block, causal, scale)


def _by_rows(q: Tensor, k: Tensor, block: int, causal: bool, scale: float) -> Tensor:
    """A row of blocks and a head at a time."""
    batch, tokens, heads, _ = q.shape
    count, group = -(-tokens // block), heads // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).permute(0, 2, 3, 1)
    out = torch.zeros(batch, count, count, dtype=torch.float32, device=q.device)
    for i in range(count):
        first, stop = i * block, min((i + 1) * block, tokens)
        seen = stop if causal else tokens
        total = q.new_zeros(batch, stop - first, seen, dtype=wide)
        for head in range(heads):
            total += (q[:, first:stop, head].to(wide) @ keys[:, head // group, :, :seen]).relu_()
        if causal:
            total[:, :, first:stop].tril_()
        best = torch.nn.functional.pad(total.amax(1), (0, -seen % block))
        out[:, i, : -(-seen // block)] = best.unflatten(1, (-1, block)).amax(2) * (scale / heads)
    return out


def _triton() -> Any:
    # Imported when first used: Triton is not there on every platform.
    from ltrain_kernels.block_scores import triton_scores

    return triton_scores
