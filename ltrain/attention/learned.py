"""Attention of a layer whose pattern has weights of its own: its branches, and its own loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltrain.attention.context import AttentionContext
from ltrain.attention.context_parallel import context_parallel_attention
from ltrain.attention.gather_blocks import gather_blocks
from ltrain.attention.patterns import Pattern
from ltrain.attention.patterns.base import LayerCall
from ltrain.attention.patterns.exchange import Place
from ltrain.attention.select import lesson_distributed
from ltrain.parallel.collectives import timed
from ltrain_kernels.block_sparse import BlockIndex


def mark_heads(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in `dtype`, its parameters marked as tensor-parallel shards by their first dimension."""
    for parameter in module.to(dtype).parameters():
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = 0  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]
    return module


def learned_attention(
    pattern: Pattern,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    context: AttentionContext,
    *,
    heads: dict[str, Any],
    shared: dict[str, Any],
    scale: float | None,
) -> Tensor:
    """out [B, T, N, D] of rotated q and k. `shared` are arguments of `context_parallel_attention`, `heads`
    those of a search that tell the layer and its heads. In training the pattern's own loss, if it has one,
    starts its backward with that of the result.
    """
    layout = context.layout
    assert layout is not None
    attend = partial(context_parallel_attention, scale=scale, traffic=context.traffic, **shared)
    call = LayerCall(
        num_tokens=layout.num_tokens,
        doc_ids=context.doc_ids,
        place=Place(context.rank, layout.world_size, layout.block_owner, layout.block),
        attend=lambda q, k, v, index: attend(q, k, v, index=index)[0],
        gather=partial(gather_blocks, layout=layout, group=context.group, traffic=context.traffic),
        cached=context.cached,
        window=shared["window"],
        scale=scale,
    )
    out = pattern.attend(module, q, k, v, index, call)
    if not (module.training and torch.is_grad_enabled()):
        return out
    with timed(context.traffic, "selection", (q,)):
        lesson = lesson_distributed(
            pattern, q.detach(), k.detach(), step=context.step, layout=layout, group=context.group,
            traffic=context.traffic, **heads,
        )  # fmt: skip
        if lesson is None:
            return out
        loss = pattern.loss(module, lesson)
    context.pattern_losses[heads["layer"]] = loss.detach()
    # The loss is a mean over this rank's heads, equal on all ranks of the group; the step's gradient is
    # summed over ranks and divided by its number of targets.
    weight = context.num_targets * k.shape[2] / heads["total_kv_heads"]
    return _WithLoss.apply(out, loss, weight)


class _WithLoss(torch.autograd.Function):
    """`out` as it is; its backward also starts the backward of `loss`, with gradient `weight`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.like = weight, loss.detach()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        return dout, torch.full_like(ctx.like, ctx.weight), None
