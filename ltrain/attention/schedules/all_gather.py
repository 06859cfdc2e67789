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
    """Deals the partial dK and dV of all members' tokens out to their owners: one all-to-all a step."""

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
        self.dk, self.dv = (
            torch.zeros(x.shape, dtype=partial_dtype(k.dtype), device=x.device) for x in (k, v)
        )

    def put(self, number: int, dk: Tensor, dv: Tensor) -> None:
        dk, dv = scatter_sum(self.channel, self.lengths, self.order, dk, dv, self.wire, self.traffic)
        self.dk += dk
        self.dv += dv

    def finish(self) -> tuple[Tensor, Tensor]:
        return self.dk, self.dv


def scatter_sum(
    channel: Channel,
    lengths: list[int],
    order: list[int],
    dk: Tensor,
    dv: Tensor,
    wire: torch.dtype,
    traffic: Traffic | None,
) -> tuple[Tensor, Tensor]:
    """This member's rows of dk and dv [all members' tokens in `order`, B, K, D], added up over the members.

    A reduce-scatter with a fixed order of summation and wide sums whatever the wire type; it sends the same
    bytes.
    """
    starts, at = {}, 0
    for member in order:
        starts[member] = at
        at += lengths[member]
    me, length = channel.me, lengths[channel.me]
    k_row, v_row = dk[0].numel() if len(dk) else 0, dv[0].numel() if len(dv) else 0
    parts, sizes = [], []
    for member in range(channel.size):
        rows = slice(starts[member], starts[member] + (lengths[member] if member != me else 0))
        parts += [dk[rows].reshape(-1).to(wire), dv[rows].reshape(-1).to(wire)]
        sizes.append((rows.stop - rows.start) * (k_row + v_row))
    expected = [length * (k_row + v_row) if member != me else 0 for member in range(channel.size)]
    (arrived,) = channel.all_to_all(torch.cat(parts), sizes, expected, traffic).wait()
    own = slice(starts[me], starts[me] + length)
    sum_k, sum_v = (x.new_zeros((length, *x.shape[1:])) for x in (dk, dv))
    at = 0
    for member in range(channel.size):
        if member == me:
            sum_k += dk[own]
            sum_v += dv[own]
            continue
        part = arrived[at : at + expected[member]]
        sum_k += part[: length * k_row].view(sum_k.shape)
        sum_v += part[length * k_row :].view(sum_v.shape)
        at += expected[member]
    return sum_k, sum_v
