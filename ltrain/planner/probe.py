"""Measuring the cost model: plans that tell its terms apart, and the fit to what they took.

The terms are linear in the constants, so that probes of a few shapes (one long document, several short ones,
every degree and schedule) and non-negative least squares on relative errors give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.cost import CostModel
from ltrain.planner.evaluate import group_seconds
from ltrain.planner.kinds import GroupKind, group_kinds, place
from ltrain.planner.plan import Group, Plan

# (documents, share of the longest probe in all): long ones tell attention from the linear part, short ones
# the linear part from the fixed one.
_SHAPES = ((1, 1.0), (1, 0.5), (8, 1.0), (32, 1.0), (2, 0.125))


def probe_cost(cost: CostModel) -> CostModel:
    """`cost` with unit constants and nothing hidden behind attention: its terms are the fit's coefficients.

    What a ring hides is in the measured rate of its transfer.
    """
    return replace(
        cost, attention_s=1.0, linear_s=1.0, fixed_s=1.0, exchange_scale=1.0, num_exchanges=1.0, overlap=0.0
    )


def probe_plans(
    cluster: ClusterSpec, cost: CostModel, *, longest: int, degrees: str | Sequence[int], block: int
) -> list[Plan]:
    """Plans of one micro-batch, each with groups of one kind inside an island and one shape of documents, on
    as many devices as it takes, of at most `longest` tokens a document."""
    plans = []
    kinds = group_kinds(cluster, cost.tokens_by_island(cluster), degrees, block)
    for k, kind in enumerate(kinds):
        islands = [i for i, count in enumerate(kind.use) if count]
        if len(islands) > 1:
            continue
        count = cluster.islands[islands[0]].size // kind.degree
        placed = None
        while placed is None:
            placed = place(cluster, kinds, [count * (j == k) for j in range(len(kinds))])
            count -= 1
        for schedule in cost.schedules_for(kind):
            for documents, share in _SHAPES:
                tokens = int(min(longest, kind.capacity) * share) // documents
                if tokens:
                    plans.append(_plan(cluster, kind, placed[k], schedule, [tokens] * documents))
    return plans


def _plan(
    cluster: ClusterSpec, kind: GroupKind, ranks: list[tuple[int, ...]], schedule: str, lengths: list[int]
) -> Plan:
    groups, number = [], len(lengths)
    for g, members in enumerate(ranks):
        sequences = tuple(range(g * number, (g + 1) * number))
        weights = (1.0 / kind.degree,) * kind.degree
        groups.append(Group(members, sequences, 0.0, schedule, sum(lengths), kind.capacity, weights))
    return Plan((tuple(groups),), 0.0, 0.0, 0.0, tuple(lengths * len(ranks)), cluster.num_devices, "probe")


def fit_cost(
    cost: CostModel, cluster: ClusterSpec, plans: Sequence[Plan], measured_s: Sequence[Sequence[float]]
) -> CostModel:
    """The cost model under which the plans' groups take closest to `measured_s` seconds (one a group).

    Least squares of relative errors with constants of 0 or more. `plans` are those of `probe_plans`.
    """
    unit = probe_cost(cost)
    silent = replace(unit, num_exchanges=0.0)
    rows = []
    for plan, times in zip(plans, measured_s, strict=True):
        for group, seconds in zip(plan.micro_batches[0], times, strict=True):
            terms = group_seconds(group, plan.lengths, cluster, unit)
            transfer = group_seconds(group, plan.lengths, cluster, silent).exchange
            coefficients = (terms.attention, terms.linear, terms.fixed, transfer, terms.exchange - transfer)
            rows.append([value / seconds for value in coefficients])
    attention, linear, fixed, transfer, latency = _non_negative(np.array(rows), np.ones(len(rows)))
    return replace(
        unit,
        attention_s=attention,
        linear_s=max(linear, 1e-12),
        fixed_s=fixed,
        exchange_scale=transfer,
        num_exchanges=latency,
    )


def _non_negative(matrix: np.ndarray, target: np.ndarray) -> list[float]:
    """The least-squares solution among those without a negative entry: the best over all sets of columns."""
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    columns = [c for c in range(matrix.shape[1]) if np.any(matrix[:, c])]
    best, least = np.zeros(matrix.shape[1]), np.inf
    for size in range(1, len(columns) + 1):
        for chosen in combinations(columns, size):
            at = list(chosen)
            found = np.linalg.lstsq(matrix[:, at] / scale[at], target, rcond=None)[0]
            error = float(np.sum((matrix[:, at] / scale[at] @ found - target) ** 2))
            if found.min() >= 0 and error < least:
                best, least = np.zeros(matrix.shape[1]), error
                best[at] = found / scale[at]
    return [float(value) for value in best]
