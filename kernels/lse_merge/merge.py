"""Join partial attention results over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltrain_kernels.errors import require


def merge(partials: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint key sets from the (out, lse) over each of them.

        lse = log sum_t exp(lse_t),   out = sum_t exp(lse_t - lse) out_t

    out [B, T, H, Dv] in the partials' common dtype, lse [B, H, T] (natural log); computed in fp32, or fp64
    where a partial is fp64. A partial without keys has lse -inf and contributes nothing, whatever its out;
    where all are empty, out is 0 and lse -inf. Differentiable in every out and lse. Associative and
    commutative but for rounding, with (0, -inf) neutral. Raises ArgumentError on an empty sequence or on
    shapes that differ.
    """
    require(len(partials) > 0, "partials", list(partials), "must hold at least one (out, lse)")
    shape, lse_shape = partials[0][0].shape, partials[0][1].shape
    fits = len(shape) == 4 and lse_shape == (shape[0], shape[2], shape[1])
    require(fits, "partials[0]", (tuple(shape), tuple(lse_shape)), "must be out [B, T, H, Dv], lse [B, H, T]")
    for n, (out, lse) in enumerate(partials):
        require(out.shape == shape, f"partials[{n}].out.shape", tuple(out.shape), f"must be {tuple(shape)}")
        require(
            lse.shape == lse_shape,
            f"partials[{n}].lse.shape",
            tuple(lse.shape),
            f"must be {tuple(lse_shape)}",
        )
    dtype = torch.float32
    for out, lse in partials:
        dtype = torch.promote_types(dtype, torch.promote_types(out.dtype, lse.dtype))
    out_dtype = partials[0][0].dtype
    for out, _ in partials[1:]:
        out_dtype = torch.promote_types(out_dtype, out.dtype)

    lses = torch.stack([lse.to(dtype) for _, lse in partials])
    top = lses.detach().amax(0)
    top = torch.where(torch.isinf(top), 0.0, top)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    seen = total > 0
    safe = torch.where(seen, total, 1.0)
    lse = torch.where(seen, top + torch.log(safe), float("-inf"))
    result = torch.zeros((), dtype=dtype, device=lses.device)
    for (out, _), weight in zip(partials, weights / safe, strict=True):
        weight = weight.transpose(1, 2).unsqueeze(-1)
        # An empty partial's out may be anything, even nan.
        result = result + torch.where(weight > 0, weight * out.to(dtype), 0.0)
    return result.to(out_dtype), lse
