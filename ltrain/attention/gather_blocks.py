"""A differentiable gather of per-block tensors over the ranks that share a sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltrain.attention.schedules.all_gather import scatter_sum
from ltrain.parallel.collectives import Channel, Group, Traffic, channel, size_of
from ltrain.parallel.layout import SequenceLayout


def gather_blocks(
    x: Tensor,
    y: Tensor,
    *,
    layout: SequenceLayout,
    group: Group,
    traffic: Traffic | None = None,
    saved: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """All ranks' blocks of x and y, [B, own blocks, ...] -> [B, blocks of the sequence, ...] in document
    order.

    The gradient of a block is summed over the ranks in fp32, in rank order. x and y have one type. saved: the
    result of an earlier call on equal inputs, returned as it is, without an exchange; the gradients are those
    of the call.
    """
    if size_of(group) == 1:
        return x, y
    counts = [len(layout.blocks(rank)) for rank in range(layout.world_size)]
    by_rank = np.concatenate([layout.blocks(rank) for rank in range(layout.world_size)])
    given = None if saved is None else tuple(t.transpose(0, 1) for t in saved)
    call = _Call(channel(group, "blocks"), counts, torch.from_numpy(by_rank).to(x.device), traffic, given)
    wide = _Gather.apply(*(t.transpose(0, 1).contiguous() for t in (x, y)), call)
    return tuple(t.transpose(0, 1) for t in wide)  # type: ignore[return-value]


class _Call:
    def __init__(
        self,
        channel: Channel,
        counts: list[int],
        by_rank: Tensor,
        traffic: Traffic | None,
        given: tuple[Tensor, ...] | None,
    ) -> None:
        self.channel, self.counts, self.by_rank, self.traffic = channel, counts, by_rank, traffic
        self.order, self.given = list(range(channel.size)), given


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, call: _Call) -> tuple[Tensor, ...]:
        ctx.call, ctx.dtype = call, x.dtype
        if call.given is not None:
            return tuple(t.detach() for t in call.given)
        wide = call.channel.all_gather((x, y), call.counts, call.order, call.traffic).wait()
        document_order = call.by_rank.argsort()
        return tuple(t.index_select(0, document_order) for t in wide)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        dx, dy = (d.index_select(0, call.by_rank) for d in (dx, dy))
        sums = scatter_sum(
            call.channel, call.counts, call.order, dx.float() if dx.dtype.itemsize < 4 else dx,
            dy.float() if dy.dtype.itemsize < 4 else dy, ctx.dtype, call.traffic,
        )  # fmt: skip
        return *(s.to(ctx.dtype) for s in sums), None
