"""Nested rings, one in the node and one across nodes, in the skewed order that keeps every step even.

After arXiv 2510.18830 section 3.3. Step a L + b of lane l on node n works on the shard of rank r - (a L + b),
as in the flat ring, so that striped layouts stay as even as there; the plain nested order mixes offsets at
lanes l < b. Only the transport is nested: each lane fetches its own lane's shard of node n - a across nodes,
one outer step ahead of need, and ranks hand the fetched shards round inside the node.

With L lanes, M nodes and s bytes of KV a rank, equal shards, a rank sends forward about (M - 1 / L) (L - 1) s
in the node and (M - 1) s between nodes; backward that again plus the same in the wire type.
Memory beyond inputs and outputs: five shards of KV; backward also four of dKV.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ltrain.attention.schedules.base import Chunk, Problem, make_step, partial_dtype
from ltrain.attention.schedules.hierarchical import fetch_shard
from ltrain.attention.schedules.nodes import Nodes
from ltrain.attention.schedules.ring import OwnerSum
from ltrain.parallel.collectives import Channel, Pending, Traffic


class NestedRing:
    def __init__(
        self,
        problem: Problem,
        nodes: Nodes,
        queries: Chunk,
        chunks: list[Chunk],
        kv: tuple[Channel, Channel],
        grad: tuple[Channel, Channel],
    ) -> None:
        self.queries, self.chunks = queries, chunks
        self.nodes, self.kv, self.grad = nodes, kv, grad
        self.node, self.lane = kv[1].me, kv[0].me
        self.me = self.node * nodes.lanes + self.lane
        self.steps = [
            make_step(problem, queries, chunks[(self.me - t) % nodes.world_size])
            for t in range(nodes.world_size)
        ]

    def source(self, outer: int) -> int:
        return (self.node - outer) % self.nodes.count

    def held(self, outer: int, inner: int, lane: int) -> int:
        """Which of its lane's fetched shards `lane`'s predecessor by `inner` hands to it: `outer`, or one
        more."""
        return (outer + (lane < inner)) % self.nodes.count

    def length(self, held: int, lane: int) -> int:
        return self.chunks[self.source(held) * self.nodes.lanes + lane].num_tokens

    def keys(self, k: Tensor, v: Tensor, traffic: Traffic | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        lanes, count = self.nodes.lanes, self.nodes.count
        shards: dict[int, tuple[Tensor, ...] | Pending] = {0: (k, v)}

        def fetch(outer: int) -> None:
            if 0 < outer < count:
                shards[outer] = fetch_shard(self.kv[1], outer, self.length(outer, self.lane), k, v, traffic)

        def shard(outer: int) -> tuple[Tensor, ...]:
            present = shards[outer]
            if isinstance(present, Pending):
                present = shards[outer] = present.wait()
            return present

        def hand_round(outer: int, inner: int) -> Pending:
            to, source = (self.lane + inner) % lanes, (self.lane - inner) % lanes
            out = shard(self.held(outer, inner, to))
            length = self.length(self.held(outer, inner, self.lane), source)
            arriving = [x.new_empty((length, *x.shape[1:])) for x in (k, v)]
            return self.kv[0].exchange([(to, x) for x in out], [(source, x) for x in arriving], traffic)

        following = Pending([], (k, v))
        fetch(1)
        for outer in range(count):
            fetch(outer + 2)
            for inner in range(lanes):
                present = shard(outer) if inner == 0 else following.wait()
                if inner + 1 < lanes:
                    following = hand_round(outer, inner + 1)
                yield outer * lanes + inner, present[0], present[1]
            if outer > 0:
                del shards[outer]

    def gradients(self, k: Tensor, v: Tensor, wire: torch.dtype, traffic: Traffic | None) -> NestedSum:
        return NestedSum(self, k, v, wire, traffic)


class NestedSum:
    """Partial dK and dV go to the lane that fetched the shard, which adds them up and sends the sum to the
    owner."""

    def __init__(
        self, plan: NestedRing, k: Tensor, v: Tensor, wire: torch.dtype, traffic: Traffic | None
    ) -> None:
        self.plan, self.wire, self.traffic = plan, wire, traffic
        self.shapes = [x.shape[1:] for x in (k, v)]
        self.dtype, self.device = partial_dtype(k.dtype), k.device
        self.sums: dict[int, list[Tensor]] = {}
        self.pending: tuple[int, Pending] | None = None
        self.across = OwnerSum(plan.grad[1], plan.source, k, v, wire, traffic)

    def put(self, number: int, dk: Tensor, dv: Tensor) -> None:
        plan, lanes = self.plan, self.plan.nodes.lanes
        outer, inner = divmod(number, lanes)
        if inner == 0:
            self._settle()
            if outer > 0:
                self._send(outer - 1)
            self._add(outer, (dk, dv))
            return
        to, source = (plan.lane - inner) % lanes, (plan.lane + inner) % lanes
        held = plan.held(outer, inner, source)
        length = plan.length(held, plan.lane)
        arriving = [torch.empty((length, *s), dtype=self.wire, device=self.device) for s in self.shapes]
        leaving = [x.to(self.wire).contiguous() for x in (dk, dv)]
        pending = plan.grad[0].exchange(
            [(to, x) for x in leaving], [(source, x) for x in arriving], self.traffic
        )
        self._settle()
        self.pending = (held, pending)

    def finish(self) -> tuple[Tensor, Tensor]:
        self._settle()
        if self.plan.nodes.count > 1:
            self._send(self.plan.nodes.count - 1)
        # Shard 0 is this rank's own; the last outer step may have added to it.
        self.across.put(0, *self.sums.pop(0))
        return self.across.finish()

    def _send(self, held: int) -> None:
        if held > 0:
            self.across.put(held, *self.sums.pop(held))

    def _add(self, held: int, parts: tuple[Tensor, ...]) -> None:
        if held not in self.sums:
            length = self.plan.length(held, self.plan.lane)
            self.sums[held] = [
                torch.zeros((length, *s), dtype=self.dtype, device=self.device) for s in self.shapes
            ]
        for total, part in zip(self.sums[held], parts, strict=True):
            total += part

    def _settle(self) -> None:
        if self.pending is not None:
            held, pending = self.pending
            self._add(held, pending.wait())
            self.pending = None
