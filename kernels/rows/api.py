"""Reading some rows of the residual, and writing them back, without full-length temporaries.

S rows (tokens), K listed rows (int64, distinct), E features; tensors are [rows, E] or [rows, 1, E]. The
functions come in pairs, a reader that also hands the residual on and a writer that takes it: the gradient of
the residual then passes both as one tensor, into which the rows' gradients are written, and rows that are not
listed get the upstream gradient unchanged, bit for bit. CPU tensors go through PyTorch, the others through
Triton.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain_kernels.errors import require


def norm_rows(x: Tensor, rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x, RMS norm of the listed rows [K, E]), the norm fused with the gather.

    Saves the K gathered rows for the backward, nothing of S rows. Use the first result, not x, from here on.
    Statistics in fp32 (fp64 for fp64). Differentiable in x and weight. Raises ArgumentError on shapes that
    don't fit.
    """
    _check(x, rows, None)
    require(weight.shape == x.shape[-1:], "weight.shape", tuple(weight.shape), "must be [E]")
    return _NormRows.apply(x, rows, weight, eps)


def add_rows(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    """x with y [K, E] added to the listed rows, in one new tensor. Saves only `rows`."""
    _check(x, rows, y)
    return _AddRows.apply(x, rows, y)


def open_rows(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(x, the listed rows [K, E]) for `close_rows`, which must take the first result: the rows belong to the
    caller until then."""
    _check(x, rows, None)
    return _OpenRows.apply(x, rows)


def close_rows(x: Tensor, rows: Tensor, y: Tensor, value: Tensor | None = None) -> Tensor:
    """x, from `open_rows`, with the listed rows replaced by y [K, E].

    The gradient of y is that of the rows; what x gets at these rows is overwritten by `open_rows`. With
    `value` [S, E] the result is `value` as it is, with the gradients as above.
    """
    _check(x, rows, y)
    return _CloseRows.apply(x, rows, y, value)


class _NormRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if _in_triton(x):
            kept, normed, rstd = _triton().norm_rows(x.contiguous(), rows, weight, eps)
        else:
            kept = x.index_select(0, rows)
            normed, rstd = F.rms_norm(kept, weight.shape, weight, eps), x.new_empty(0)
        ctx.save_for_backward(kept, rows, weight, rstd)
        ctx.eps = eps
        return x.view_as(x), normed

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dnormed: Tensor) -> tuple[Tensor | None, ...]:
        kept, rows, weight, rstd = ctx.saved_tensors
        out = dx.clone(memory_format=torch.contiguous_format)
        if _in_triton(kept):
            dweight = _triton().norm_rows_backward(dnormed, kept, rows, weight, rstd, out)
            return out, None, dweight.to(weight.dtype), None
        wide = torch.promote_types(kept.dtype, torch.float32)
        g, hat = dnormed.to(wide), kept.to(wide)
        scale = (hat.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        hat = hat * scale
        dweight = (g * hat).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        g = g * weight.to(wide)
        g = scale * (g - hat * (g * hat).mean(-1, keepdim=True))
        out.index_add_(0, rows, g.to(out.dtype))
        return out, None, dweight, None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        if _in_triton(x):
            return _triton().write_rows(x.contiguous(), rows, y, add=True)
        return x.index_add(0, rows, y)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return dout, None, dout.index_select(0, rows)


class _OpenRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return x.view_as(x), x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, drows: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return dx.index_copy(0, rows, drows), None


class _CloseRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, y: Tensor, value: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows)
        if value is not None:
            return value.view_as(value)
        if _in_triton(x):
            return _triton().write_rows(x.contiguous(), rows, y, add=False)
        return x.index_copy(0, rows, y)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return dout, None, dout.index_select(0, rows), None


def _check(x: Tensor, rows: Tensor, y: Tensor | None) -> None:
    flat = x.dim() == 2 or (x.dim() == 3 and x.shape[1] == 1)
    require(flat, "x.shape", tuple(x.shape), "must be [rows, features] or [rows, 1, features]")
    require(rows.dim() == 1 and rows.dtype == torch.int64, "rows", rows.dtype, "must be one int64 list")
    if y is not None:
        shape = (len(rows), *x.shape[1:])
        require(tuple(y.shape) == shape, "y.shape", tuple(y.shape), f"must be {shape}")
        require(y.dtype == x.dtype, "y.dtype", y.dtype, f"must be x's, {x.dtype}")


def _in_triton(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64 and x.shape[-1] <= _triton().MAX_FEATURES


def _triton() -> Any:
    # Imported when first used: Triton is not there on every platform.
    from ltrain_kernels.rows import triton_rows

    return triton_rows
