"""All-gather: every rank fetches all keys and values once, then makes one attention call (arXiv 2407.21783,
3.3.2).

The partial dK and dV of all tokens go to their owners in one all-to-all and are added there in rank order.
The simplest schedule, and a good one where KV heads are few; its memory grows with the whole sequence.

Bytes sent by rank r: forward (W - 1) s_r, with s_r the bytes of its keys and values; backward that again plus
the sum over i other than r of s_i in the wire type. Memory beyond inputs and outputs: KV of the whole
sequence, and backward dKV of the whole sequence in fp32 and once on the wire.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ltrain.attention.schedules.base import Chunk, Problem, make_step, partial_dtype
from ltrain.parallel.collectives import Channel, Traffic


class AllGather:
    def __init__(
        self,
        problem: Problem,
        whole: Chunk,
        order: list[int],
        queries: Chunk,
        kv_channel: Channel,
        grad_channel: Channel,
    ) -> None:
        self.queries = queries
        self.order = order
        self.lengths = list(problem.layout.lengths)
        self.kv_channel, self.grad_channel = kv_channel, grad_channel
        self.steps = [make_step(problem, queries, whole)]

    def keys(self, k: Tensor, v: Tensor, traffic: Traffic | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        k, v = self.kv_channel.all_gather((k, v), self.lengths, self.order, traffic).wait()
        yield 0, k, v

    def gradients(self, k: Tensor, v: Tensor, wire: torch.dtype, traffic: Traffic | None) -> ScatterSum:
        return ScatterSum(self.grad_channel, self.lengths, self.order, k, v, wire, traffic)


class ScatterSum:
    """Deals the partial dK and dV of gathered chunks out to their owners, who add them in member order.

    One all-to-all a step. This is a reduce-scatter with a fixed order of summation and fp32 sums whatever the
    wire type; it sends the same bytes.
    """

    def __init__(
        self,
        channel: Channel,
        lengths: list[int],
        order: list[int],
        k: Tensor,
        v: Tensor,
        wire: torch.dtype,
        traffic: Traffic | None,
    ) -> None:
        self.channel, self.lengths, self.order, self.wire, self.traffic = (
            channel,
            lengths,
            order,
            wire,
            traffic,
        )
        self.sums = partial_dtype(k.dtype)
        self.shapes = [x.shape[1:] for x in (k, v)]
        self.dk, self.dv = (torch.zeros(x.shape, dtype=self.sums, device=x.device) for x in (k, v))

    def put(self, number: int, dk: Tensor, dv: Tensor) -> None:
        """Partial gradients of all members' tokens, chunks in the order `order`."""
        starts, at = {}, 0
        for member in self.order:
            starts[member] = at
            at += self.lengths[member]
        me, length = self.channel.me, self.lengths[self.channel.me]
        width = sum(shape.numel() for shape in self.shapes)
        parts, sizes = [], []
        for member in range(self.channel.size):
            rows = slice(starts[member], starts[member] + (self.lengths[member] if member != me else 0))
            parts += [dk[rows].reshape(-1).to(self.wire), dv[rows].reshape(-1).to(self.wire)]
            sizes.append((rows.stop - rows.start) * width)
        pending = self.channel.all_to_all(
            torch.cat(parts),
            sizes,
            [length * width if m != me else 0 for m in range(self.channel.size)],
            self.traffic,
        )
        own = slice(starts[me], starts[me] + length)
        split = length * self.shapes[0].numel()
        (arrived,) = pending.wait()
        at = 0
        for member in range(self.channel.size):
            if member == me:
                self.dk += dk[own]
                self.dv += dv[own]
                continue
            part = arrived[at : at + length * width]
            self.dk += part[:split].view(self.dk.shape)
            self.dv += part[split:].view(self.dv.shape)
            at += length * width

    def finish(self) -> tuple[Tensor, Tensor]:
        return self.dk, self.dv
