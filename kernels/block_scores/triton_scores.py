"""Triton kernel of the block scores: a program a tile, its heads in a loop, only the maximum is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def block_scores_kernel(
    q, k, out, q_b, q_t, q_h, k_b, k_t, k_h, T, N, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[b, i, j] = max over the block pair of mean_heads relu(scale q . k); 0 for those wholly in the
    future."""
    i = tl.program_id(0)
    j = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    PARTS: tl.constexpr = BLOCK // TILE
    best = tl.zeros([TILE, TILE], tl.float32)
    if j <= i or not CAUSAL:
        for part in range(PARTS * PARTS):
            rows = i * BLOCK + (part // PARTS) * TILE + tl.arange(0, TILE)
            cols = j * BLOCK + (part % PARTS) * TILE + tl.arange(0, TILE)
            d = tl.arange(0, BLOCK_D)
            q_at = q + b * q_b + rows.to(tl.int64)[:, None] * q_t + d[None, :]
            k_at = k + b * k_b + cols.to(tl.int64)[:, None] * k_t + d[None, :]
            q_in = (rows < T)[:, None] & (d < D)[None, :]
            k_in = (cols < T)[:, None] & (d < D)[None, :]
            total = tl.zeros([TILE, TILE], tl.float32)
            for head in range(HEADS):
                q_tile = tl.load(q_at + head * q_h, mask=q_in, other=0.0)
                k_tile = tl.load(k_at + (head // GROUP) * k_h, mask=k_in, other=0.0)
                pairs = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
                total += tl.maximum(pairs, 0.0)
            if CAUSAL:
                total = tl.where(cols[None, :] <= rows[:, None], total, 0.0)
            best = tl.maximum(best, total)
    tl.store(out + (b * N + i) * N + j, tl.max(best) * (scale / HEADS))


def block_scores(q: Tensor, k: Tensor, block: int, *, causal: bool, scale: float) -> Tensor:
    """As the reference; q and k with unit stride along the head size."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    batch, tokens, heads, dim = q.shape
    count = -(-tokens // block)
    out = torch.empty(batch, count, count, dtype=torch.float32, device=q.device)
    side, num_warps = tile(block, q.dtype)
    if out.numel():
        block_scores_kernel[(count, count, batch)](
            q, k, out, q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2),
            tokens, count, scale, HEADS=heads, GROUP=heads // k.shape[2], D=dim,
            BLOCK_D=max(16, triton.next_power_of_2(dim)), BLOCK=block, TILE=side, CAUSAL=causal,
            PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=num_warps,
        )  # fmt: skip
    return out


def tile(block: int, dtype: torch.dtype) -> tuple[int, int]:
    """(side of the tiles that a program compares at a time, its warps): what is added up fits the registers,
    through which exact fp32 products go too."""
    return (min(32, block), 8) if dtype == torch.float32 else (min(64, block), 4)
