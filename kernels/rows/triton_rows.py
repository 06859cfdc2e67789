"""Triton kernels of the row operations: one pass over the rows that are read or written, no atomics.

S rows of the residual, K listed rows, E features. A program holds whole rows, so E is bounded by registers
(MAX_FEATURES).
"""

# ruff: noqa: SIM108 - an `if` on a constexpr chooses what is compiled; it reads better as a branch.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_FEATURES = 16384
# Rows of a program in the backward; each program adds up its own part of the weight's gradient.
_BACKWARD_ROWS = 32


@triton.jit
def norm_rows_kernel(x, rows, weight, kept, normed, rstd, eps, E, BLOCK: tl.constexpr):
    """kept = x[rows], normed = its RMS norm, rstd fp32 [K]; a program a listed row."""
    row = tl.program_id(0)
    source = tl.load(rows + row).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < E
    raw = tl.load(x + source * E + at, mask=inside, other=0.0)
    value = raw.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / E + eps)
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    out = row.to(tl.int64) * E + at
    tl.store(kept + out, raw, mask=inside)
    tl.store(normed + out, (value * scale * w).to(normed.dtype.element_ty), mask=inside)
    tl.store(rstd + row, scale)


@triton.jit
def norm_rows_backward_kernel(
    grad, kept, rows, weight, rstd, dx, dweight, K, E, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add the norm's gradient to dx[rows]; dweight fp32 [programs, E] holds each program's partial sum."""
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < E
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(ROWS):
        # Rows beyond the last are the last one, with nothing of it seen.
        last = program * ROWS + i
        row = tl.minimum(last, K - 1)
        there = at < tl.where(last < K, E, 0)
        g = tl.load(grad + row.to(tl.int64) * E + at, mask=there, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        hat = tl.load(kept + row.to(tl.int64) * E + at, mask=there, other=0.0).to(tl.float32) * scale
        total += g * hat
        gw = g * w
        d = scale * (gw - hat * (tl.sum(gw * hat, 0) / E))
        target = dx + tl.load(rows + row).to(tl.int64) * E + at
        old = tl.load(target, mask=there, other=0.0).to(tl.float32)
        tl.store(target, (old + d).to(dx.dtype.element_ty), mask=there)
    tl.store(dweight + program.to(tl.int64) * E + at, total, mask=inside)


@triton.jit
def write_rows_kernel(x, place, y, out, E, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """out = x, but where place[row] >= 0 it is y[place], added to x with ADD; a program a row of x."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < E
    source = tl.load(place + row)
    value = tl.load(x + row * E + at, mask=inside, other=0.0)
    if source >= 0:
        new = tl.load(y + source.to(tl.int64) * E + at, mask=inside, other=0.0)
        if ADD:
            value = (value.to(tl.float32) + new.to(tl.float32)).to(value.dtype)
        else:
            value = new
    tl.store(out + row * E + at, value, mask=inside)


def norm_rows(x: Tensor, rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(kept [K, ..., E], normed [K, ..., E], rstd fp32 [K])."""
    count, size = len(rows), x.shape[-1]
    kept, normed = (x.new_empty(count, *x.shape[1:]) for _ in range(2))
    rstd = torch.empty(count, dtype=torch.float32, device=x.device)
    if count:
        block = triton.next_power_of_2(size)
        norm_rows_kernel[(count,)](
            x, rows, weight, kept, normed, rstd, eps, size, BLOCK=block, num_warps=warps(block)
        )
    return kept, normed, rstd


def norm_rows_backward(
    grad: Tensor, kept: Tensor, rows: Tensor, weight: Tensor, rstd: Tensor, dx: Tensor
) -> Tensor:
    """Adds to dx[rows] in place; returns the weight's gradient, fp32 [E]."""
    count, size = kept.shape[0], kept.shape[-1]
    programs = -(-count // _BACKWARD_ROWS)
    partial = torch.empty(programs, size, dtype=torch.float32, device=kept.device)
    if count:
        block = triton.next_power_of_2(size)
        norm_rows_backward_kernel[(programs,)](
            grad.contiguous(), kept, rows, weight, rstd, dx, partial, count, size,
            ROWS=_BACKWARD_ROWS, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip
    return partial.sum(0)


def write_rows(x: Tensor, rows: Tensor, y: Tensor, *, add: bool) -> Tensor:
    """x [S, ..., E] with y [K, ..., E] added to, or in place of, the listed rows: one new tensor."""
    out = torch.empty_like(x)
    if x.numel():
        place = torch.full((x.shape[0],), -1, dtype=torch.int32, device=x.device)
        place[rows] = torch.arange(len(rows), dtype=torch.int32, device=x.device)
        block = triton.next_power_of_2(x.shape[-1])
        write_rows_kernel[(x.shape[0],)](
            x, place, y.contiguous(), out, x.shape[-1], ADD=add, BLOCK=block, num_warps=warps(block)
        )
    return out


def warps(block: int) -> int:
    """Warps of a program that holds rows of `block` features."""
    return max(1, min(16, block // 512))
