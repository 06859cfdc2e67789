"""Measuring the cost model: the fit finds the constants that made the times."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ltrain.planner import ClusterSpec, CostModel, Link, Node
from ltrain.planner.evaluate import group_seconds
from ltrain.planner.groups import ranks_per_node
from ltrain.planner.probe import fit_cost, probe_cost, probe_plans

BASE = CostModel(1.0, 1.0, 1.0, 2e5, num_heads=8, num_kv_heads=2)
TWO_NODES = ClusterSpec.uniform(8, 4, 10.0, 1.0, 3000, latency_s=1e-4)
MIXED = ClusterSpec(
    (
        Node(4, Link(10.0, 1e-4), Link(1.0, 1e-3), "a", 2.0, 4000),
        Node(4, Link(10.0, 1e-4), Link(1.0, 1e-3), "b", 1.0, 2000),
    )
)


@pytest.mark.parametrize("cluster", [TWO_NODES, MIXED], ids=["equal", "mixed"])
def test_the_fit_finds_the_constants_and_predicts_within_noise(cluster: ClusterSpec) -> None:
    truth = replace(
        probe_cost(BASE),
        attention_s=3e-9,
        linear_s=2e-5,
        fixed_s=4e-3,
        exchange_scale=1.7,
        num_exchanges=6.0,
    )
    plans = probe_plans(cluster, BASE, longest=8000, degrees="powers_of_two", block=128)
    degrees = {group.degree for plan in plans for group in plan.micro_batches[0]}
    assert {1, 2, 4} <= degrees and all(len(plan.micro_batches) == 1 for plan in plans)
    rng = np.random.default_rng(0)
    for noise, tolerance in ((0.0, 1e-6), (0.03, 0.12)):
        measured = [
            [
                group_seconds(g, plan.lengths, cluster, truth).total * (1 + noise * rng.standard_normal())
                for g in plan.micro_batches[0]
            ]
            for plan in plans
        ]
        found = fit_cost(BASE, cluster, plans, measured)
        assert found.attention_s == pytest.approx(3e-9, rel=tolerance)
        assert found.linear_s == pytest.approx(2e-5, rel=tolerance)
        for plan in plans:
            for group in plan.micro_batches[0]:
                want = group_seconds(group, plan.lengths, cluster, truth).total
                have = group_seconds(group, plan.lengths, cluster, found).total
                assert have == pytest.approx(want, rel=max(tolerance, 1e-5))


def test_no_constant_is_negative_where_times_contradict_the_model() -> None:
    plans = probe_plans(TWO_NODES, BASE, longest=2000, degrees="powers_of_two", block=128)
    # Larger groups are faster than perfect scaling, so the exchange would have to be negative.
    measured = [
        [
            (1e-8 * sum(plan.lengths[s] ** 2 for s in g.sequences) + 1e-3) / g.degree**1.3
            for g in plan.micro_batches[0]
        ]
        for plan in plans
    ]
    found = fit_cost(BASE, TWO_NODES, plans, measured)
    for name in ("attention_s", "linear_s", "fixed_s", "exchange_scale", "num_exchanges"):
        assert getattr(found, name) >= 0
    assert found.attention_s > 0


def test_members_on_each_node() -> None:
    assert ranks_per_node(TWO_NODES, (0, 1)) is None
    assert ranks_per_node(TWO_NODES, (2, 3, 4, 5)) == 2
    assert ranks_per_node(TWO_NODES, range(8)) == 4
    assert ranks_per_node(TWO_NODES, (3, 4, 5)) is None
