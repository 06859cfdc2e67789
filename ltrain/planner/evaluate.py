"""What a given plan would take on a given cluster, whoever made the plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.cost import CostModel
from ltrain.planner.kinds import GroupKind
from ltrain.planner.plan import Group, Plan


@dataclass(frozen=True)
class GroupSeconds:
    """Predicted seconds of one group, in the terms of the cost model."""

    attention: float
    linear: float
    exchange: float
    fixed: float

    @property
    def total(self) -> float:
        return self.attention + self.linear + self.exchange + self.fixed


def kind_of_ranks(
    cluster: ClusterSpec, cost: CostModel, ranks: Sequence[int], weights: Sequence[float]
) -> GroupKind:
    """The kind of a group that stands on exactly these ranks with these shares."""
    node_of = np.repeat(np.arange(len(cluster.nodes)), [node.num_devices for node in cluster.nodes])
    here = Counter(int(node_of[rank]) for rank in ranks)
    nodes = [cluster.nodes[n] for n in here]
    use, shares = [], []
    for island in cluster.islands:
        inside = [i for i, r in enumerate(ranks) if island.first_rank <= r < island.first_rank + island.size]
        use.append(len(inside))
        shares.append(max((weights[i] for i in inside), default=0.0))
    rates = [(weight, cluster.nodes[int(node_of[rank])]) for rank, weight in zip(ranks, weights, strict=True)]
    latencies = (
        [node.inter.latency_s for node in nodes if node.inter]
        if len(here) > 1
        else [node.intra.latency_s for node in nodes]
    )
    return GroupKind(
        len(ranks),
        tuple(use),
        tuple(shares),
        min(int(cost.tokens_of(node) / weight + 1e-6) for weight, node in rates),
        max(weight / node.speed for weight, node in rates),
        len(here),
        max(here.values()),
        min(node.intra.gb_s for node in nodes),
        min((node.inter.gb_s for node in nodes if node.inter), default=float("inf")),
        max(latencies, default=0.0),
        cluster.all_to_all_gb_s.get(len(ranks)) if sum(1 for count in use if count) == 1 else None,
    )


def group_seconds(
    group: Group, lengths: Sequence[int], cluster: ClusterSpec, cost: CostModel
) -> GroupSeconds:
    """The group's terms under `cost`, with the schedule that the plan gave it."""
    kind = kind_of_ranks(cluster, cost, group.ranks, group.weights)
    terms = cost.terms(kind, np.array([lengths[s] for s in group.sequences]), group.schedule)
    return GroupSeconds(
        float(terms.attention.sum()),
        float(terms.linear.sum()),
        float(terms.exchange.sum()) + terms.latency,
        terms.fixed,
    )


def evaluate(plan: Plan, cluster: ClusterSpec, cost: CostModel) -> float:
    """Step seconds of the plan under another cost model or cluster than it was made for."""
    return sum(
        max(group_seconds(group, plan.lengths, cluster, cost).total for group in groups)
        for groups in plan.micro_batches
    )
