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
    x: Tensor, y: Tensor, *, layout: SequenceLayout, group: Group, traffic: Traffic | None = None
) -> tuple[Tensor, Tensor]:
    """All ranks' blocks of x and y, [B, own blocks, ...] -> [B, blocks of the sequence, ...] in document
    order.

    The gradient of a block is summed over the ranks in fp32, in rank order. x and y have one type.
    """
    if size_of(group) == 1:
        return x, y
    counts = [len(layout.blocks(rank)) for rank in range(layout.world_size)]
    by_rank = np.concatenate([layout.blocks(rank) for rank in range(layout.world_size)])
    order = torch.from_numpy(np.argsort(by_rank)).to(x.device)
    call = _Call(channel(group, "blocks"), counts, traffic)
    wide = _Gather.apply(*(t.transpose(0, 1).contiguous() for t in (x, y)), call)
    return tuple(t.index_select(0, order).transpose(0, 1) for t in wide)  # type: ignore[return-value]


class _Call:
    def __init__(self, channel: Channel, counts: list[int], traffic: Traffic | None) -> None:
        self.channel, self.counts, self.traffic = channel, counts, traffic
        self.order = list(range(channel.size))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, call: _Call) -> tuple[Tensor, ...]:
        ctx.call, ctx.dtype = call, x.dtype
        return call.channel.all_gather((x, y), call.counts, call.order, call.traffic).wait()

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        sums = scatter_sum(
            call.channel, call.counts, call.order, dx.float() if dx.dtype.itemsize < 4 else dx,
            dy.float() if dy.dtype.itemsize < 4 else dy, ctx.dtype, call.traffic,
        )  # fmt: skip
        return *(s.to(ctx.dtype) for s in sums), None
