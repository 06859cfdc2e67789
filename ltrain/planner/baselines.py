"""Policies to hold a plan against, and the greedy plan that stands in for one that is late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.planner.bounds import area_bound
from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.cost import CostModel
from ltrain.planner.divide import divide
from ltrain.planner.enumerate import Solved
from ltrain.planner.kinds import degrees_up_to, place
from ltrain.planner.listing import Rule, deal
from ltrain.planner.plan import Plan
from ltrain.planner.problem import Assignment, BatchTable, Problem, assignment
from ltrain.planner.solve import build_plan, plan_batch


def static_plan(lengths: Sequence[int], cluster: ClusterSpec, cost: CostModel, degree: int) -> Plan:
    """Groups of one degree only, with everything else as in `plan_batch`. Raises ConfigError where it can't
    hold the longest sequence."""
    return replace(
        plan_batch(lengths, cluster, cost, solver="enumerate", degrees=[degree]), solver=f"static {degree}"
    )


def batch_adaptive_plan(
    lengths: Sequence[int],
    cluster: ClusterSpec,
    cost: CostModel,
    degrees: str | Sequence[int] = "powers_of_two",
) -> Plan:
    """The best single degree for this batch."""
    plans = []
    for degree in degrees_up_to(cluster.num_devices, degrees):
        try:
            plans.append(static_plan(lengths, cluster, cost, degree))
        except ConfigError:
            continue
    if not plans:
        plan_batch(lengths, cluster, cost, degrees=degrees)
        raise AssertionError("no degree holds a batch that a mixed group does: plan it instead")
    return min(plans, key=lambda plan: plan.predicted_s)


def greedy_plan(
    lengths: Sequence[int],
    cluster: ClusterSpec,
    cost: CostModel,
    *,
    degrees: str | Sequence[int] = "powers_of_two",
    block: int = 1,
) -> Plan:
    """Longest-first dealing in groups of one kind per micro-batch, without search: milliseconds.

    The least number of micro-batches that can be dealt so. Raises ConfigError where a sequence fits no group.
    """
    table = BatchTable(lengths, cluster, cost, degrees, block)
    least = max(1, -(-int(table.lengths.sum()) // table.cluster_tokens))
    for parts in range(least, len(table.lengths) + 1):
        runs = divide(table.lengths, parts)
        dealt = [_deal_one_kind(table.problem(*run), cluster) for run in runs]
        if all(one is not None for one in dealt):
            solved = [
                Solved(one, area_bound(table.problem(*run))) for one, run in zip(dealt, runs, strict=True)
            ]
            return build_plan(table, runs, solved, "greedy")
    raise AssertionError("every sequence fits alone")


def _deal_one_kind(problem: Problem, cluster: ClusterSpec) -> Assignment | None:
    most = [min(int(s // u) for s, u in zip(problem.sizes, use, strict=True) if u) for use in problem.use]
    counts = np.diag(most).astype(np.int64)
    counts = counts[[place(cluster, problem.kinds, row.tolist()) is not None for row in counts]]
    rules: tuple[Rule, ...] = ("earliest", "best_fit")
    for rule in rules:
        kind_of, group_of, makespan = deal(problem, counts, rule, np.full(len(counts), 1e-9))
        row = int(makespan.argmin())
        if np.isfinite(makespan[row]):
            return assignment(problem, counts[row], kind_of[row, : int(counts[row].sum())], group_of[row])
    return None


def balanced_squares_s(lengths: Sequence[int], cluster: ClusterSpec, cost: CostModel) -> float:
    """Step seconds of scheduling by squared length alone, as hybrid context parallelism in Megatron-core
    does.

    Every sequence has the least power-of-two degree that holds it; sequences, longest first, open a group on
    free ranks, or join the group of their degree with the least sum of s^2 / degree, while that stays below
    the wave's largest sum; what is left makes the next wave. Sequences of a group run one by one, so memory
    never binds beyond the degree. The fixed time counts once per wave, which favours this policy.
    """
    table = BatchTable(lengths, cluster, cost)
    if len(cluster.islands) > 1:
        raise ConfigError("cluster.nodes", len(cluster.islands), "must be equal for this policy")
    left = list(range(len(table.lengths)))
    total = 0.0
    while left:
        used = 0
        wave: list[_Queue] = []
        later: list[int] = []
        for s in left:
            length = int(table.lengths[s])
            k = max(i for i in range(len(table.kinds)) if table.capacity[i] >= length)
            degree = table.kinds[k].degree
            load = float(length) ** 2 / degree
            lightest = min(
                (queue for queue in wave if queue.kind == k), key=lambda queue: queue.load, default=None
            )
            if used + degree <= cluster.num_devices:
                wave.append(_Queue(k, load, [s]))
                used += degree
            elif lightest is not None and lightest.load + load <= max(queue.load for queue in wave):
                lightest.load += load
                lightest.rows.append(s)
            else:
                later.append(s)
        total += max(table.best_schedule(table.kinds[queue.kind], np.array(queue.rows))[1] for queue in wave)
        left = later
    return total


@dataclass
class _Queue:
    kind: int
    load: float
    rows: list[int]
