"""The row operations in plain PyTorch, differentiated by autograd: what the kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def norm_rows(x_SE: Tensor, rows_K: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) of the listed rows [K, E], statistics in fp32 (fp64 for fp64)."""
    wide = torch.promote_types(x_SE.dtype, torch.float32)
    x = x_SE[rows_K].to(wide)
    normed = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed * weight_E.to(wide)).to(x_SE.dtype)


def add_rows(x_SE: Tensor, rows_K: Tensor, y_KE: Tensor) -> Tensor:
    """x with y added to the listed rows, which are distinct."""
    return x_SE.index_add(0, rows_K, y_KE)


def replace_rows(x_SE: Tensor, rows_K: Tensor, y_KE: Tensor) -> Tensor:
    """x with the listed rows, which are distinct, replaced by y."""
    return x_SE.index_copy(0, rows_K, y_KE)
