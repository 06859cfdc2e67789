"""Gather in the node, ring across nodes: one attention call a node's worth of keys.

At outer step a the ranks of node n work on the keys of node n - a. Each lane fetches its own lane's shard of
that node over the slow link, posted two steps ahead and straight from its owner; the node then gathers the
shards over its fast link while the step before is worked on. In the backward pass the node adds up its ranks'
partial dK and dV in an all-to-all, and each lane sends one sum to the owner across nodes (beats the nested
ring of arXiv 2510.18830 section 3.3 by launches: one a node instead of one a rank).

With L lanes, M nodes and s bytes of KV a rank, equal shards, a rank sends forward M (L - 1) s in the node and
(M - 1) s between nodes; backward that again plus the same in the wire type.
Memory beyond inputs and outputs: KV of two nodes and of two shards; backward also dKV of a node in fp32 and
on the wire.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ltrain.attention.schedules.all_gather import scatter_sum
from ltrain.attention.schedules.base import Chunk, Problem, make_step
from ltrain.attention.schedules.nodes import Nodes
from ltrain.attention.schedules.ring import OwnerSum
from ltrain.parallel.collectives import Channel, Pending, Traffic


class Hierarchical:
    def __init__(
        self,
        problem: Problem,
        nodes: Nodes,
        queries: Chunk,
        kv: tuple[Channel, Channel],
        grad: tuple[Channel, Channel],
    ) -> None:
        self.queries = queries
        self.nodes, self.kv, self.grad = nodes, kv, grad
        self.node, self.lane = kv[1].me, kv[0].me
        chunks = [problem.chunk(nodes.members(node)) for node in range(nodes.count)]
        lengths = problem.layout.lengths
        self.lengths = [[lengths[rank] for rank in nodes.members(node)] for node in range(nodes.count)]
        self.orders = [[rank % nodes.lanes for rank in order] for _, order in chunks]
        self.steps = [make_step(problem, queries, chunks[self.source(a)][0]) for a in range(nodes.count)]

    def source(self, step: int) -> int:
        """The node whose keys are worked on at a step."""
        return (self.node - step) % self.nodes.count

    def keys(self, k: Tensor, v: Tensor, traffic: Traffic | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        outer: dict[int, Pending] = {}

        def fetch(step: int) -> None:
            if 0 < step < self.nodes.count:
                outer[step] = fetch_shard(
                    self.kv[1], step, self.lengths[self.source(step)][self.lane], k, v, traffic
                )

        def gather(step: int) -> Pending:
            shard = (k, v) if step == 0 else outer.pop(step).wait()
            source = self.source(step)
            return self.kv[0].all_gather(shard, self.lengths[source], self.orders[source], traffic)

        fetch(1)
        fetch(2)
        following = gather(0)
        for step in range(self.nodes.count):
            present = following.wait()
            last = step + 1 == self.nodes.count
            # The first hop has had no step to hide behind: work on this node's keys before waiting for it.
            if step > 0 and not last:
                following = gather(step + 1)
                fetch(step + 3)
            yield step, *present
            if step == 0 and not last:
                following = gather(1)
                fetch(3)

    def gradients(self, k: Tensor, v: Tensor, wire: torch.dtype, traffic: Traffic | None) -> NodeSum:
        return NodeSum(self, k, v, wire, traffic)


def fetch_shard(
    across: Channel, step: int, length: int, k: Tensor, v: Tensor, traffic: Traffic | None
) -> Pending:
    """Send this rank's own shard `step` nodes on, and receive that of `step` nodes back."""
    to, source = (across.me + step) % across.size, (across.me - step) % across.size
    arriving = [x.new_empty((length, *x.shape[1:])) for x in (k, v)]
    return across.exchange([(to, k), (to, v)], [(source, x) for x in arriving], traffic)


class NodeSum:
    """Adds a node's partial dK and dV up over its ranks, then sends one sum a lane to the owner across
    nodes."""

    def __init__(
        self, plan: Hierarchical, k: Tensor, v: Tensor, wire: torch.dtype, traffic: Traffic | None
    ) -> None:
        self.plan, self.wire, self.traffic = plan, wire, traffic
        self.across = OwnerSum(plan.grad[1], plan.source, k, v, wire, traffic)

    def put(self, number: int, dk: Tensor, dv: Tensor) -> None:
        source = self.plan.source(number)
        dk, dv = scatter_sum(
            self.plan.grad[0],
            self.plan.lengths[source],
            self.plan.orders[source],
            dk,
            dv,
            self.wire,
            self.traffic,
        )
        self.across.put(number, dk, dv)

    def finish(self) -> tuple[Tensor, Tensor]:
        return self.across.finish()
