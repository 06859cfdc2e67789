"""Flat ring: each rank's keys and values visit every rank, one hop a step (arXiv 2310.01889, 2510.18830
section 3).

At step t rank r works on the shard of rank r - t while the shard of rank r - t - 1 arrives. In the backward
pass the partial dK and dV of step t go straight from rank r to their owner r - t, over a communicator of
their own, and are added there in the order of the steps: one rounding to the wire type, whatever the number
of ranks.

Bytes sent by rank r, with s_i the bytes of rank i's keys and values: forward, the sum of s_i over i other
than r + 1; backward, that again plus the sum over i other than r of s_i in the wire type.
Memory beyond inputs and outputs: two shards of KV, and backward two of dKV on the wire and two in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ltrain.attention.schedules.base import Chunk, Problem, Step, make_step, partial_dtype
from ltrain.parallel.collectives import Channel, Pending, Traffic


class Ring:
    """A ring of the members of a channel; `chunks[i]` are the tokens that member i holds."""

    def __init__(
        self,
        problem: Problem,
        chunks: list[Chunk],
        queries: Chunk,
        kv_channel: Channel,
        grad_channel: Channel,
    ) -> None:
        self.queries = queries
        self.chunks = chunks
        self.kv_channel, self.grad_channel = kv_channel, grad_channel
        self.me, self.size = kv_channel.me, kv_channel.size
        self.steps: list[Step] = [
            make_step(problem, queries, chunks[self.owner(t)]) for t in range(self.size)
        ]

    def owner(self, step: int) -> int:
        return (self.me - step) % self.size

    def keys(self, k: Tensor, v: Tensor, traffic: Traffic | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        after, before = (self.me + 1) % self.size, (self.me - 1) % self.size
        for t in range(self.size):
            pending = None
            if t + 1 < self.size:
                length = self.chunks[self.owner(t + 1)].num_tokens
                arriving = [x.new_empty((length, *x.shape[1:])) for x in (k, v)]
                pending = self.kv_channel.exchange(
                    [(after, k), (after, v)], [(before, x) for x in arriving], traffic
                )
            yield t, k, v
            if pending is not None:
                k, v = pending.wait()

    def gradients(self, k: Tensor, v: Tensor, wire: torch.dtype, traffic: Traffic | None) -> OwnerSum:
        return OwnerSum(self.grad_channel, self.owner, k, v, wire, traffic)


class OwnerSum:
    """Sends each step's partial dK and dV to the member that owns the keys; adds up what arrives, in step
    order.

    `owner(step)` must be a rotation of the members: where this member works on the keys of me - x, its own
    keys are worked on by me + x.
    """

    def __init__(
        self,
        channel: Channel,
        owner: Callable[[int], int],
        k: Tensor,
        v: Tensor,
        wire: torch.dtype,
        traffic: Traffic | None,
    ) -> None:
        self.channel, self.owner, self.wire, self.traffic = channel, owner, wire, traffic
        sums = partial_dtype(k.dtype)
        self.dk, self.dv = (torch.zeros(x.shape, dtype=sums, device=x.device) for x in (k, v))
        self.pending: Pending | None = None

    def put(self, number: int, dk: Tensor, dv: Tensor) -> None:
        owner, me = self.owner(number), self.channel.me
        if owner == me:
            self.dk += dk
            self.dv += dv
            return
        worker = (2 * me - owner) % self.channel.size
        arriving = [torch.empty(x.shape, dtype=self.wire, device=x.device) for x in (self.dk, self.dv)]
        leaving = [x.to(self.wire).contiguous() for x in (dk, dv)]
        pending = self.channel.exchange(
            [(owner, x) for x in leaving], [(worker, x) for x in arriving], self.traffic
        )
        self._add_arrived()
        self.pending = pending

    def finish(self) -> tuple[Tensor, Tensor]:
        self._add_arrived()
        return self.dk, self.dv

    def _add_arrived(self) -> None:
        if self.pending is not None:
            dk, dv = self.pending.wait()
            self.dk += dk
            self.dv += dv
            self.pending = None
