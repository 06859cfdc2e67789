"""One micro-batch by walking partitions: bound them all, deal sequences in the best few, repair, keep the
best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ltrain.planner.aggregate import aggregated_partitions
from ltrain.planner.bounds import PartitionBound, area_bound
from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.kinds import place
from ltrain.planner.listing import Rule, deal
from ltrain.planner.partitions import TooManyPartitionsError, all_partitions
from ltrain.planner.problem import Assignment, Problem, assignment
from ltrain.planner.repair import repair

# More partitions than these are not listed; the aggregated program proposes some instead.
MAX_PARTITIONS = 30_000
_PASSES: tuple[tuple[Rule, tuple[float, ...]], ...] = (
    ("earliest", (1.004,)),
    ("fill", (1.004, 1.015, 1.03, 1.06)),
    ("best_fit", (1.02, 1.06, 1.2)),
)
_GOOD_ENOUGH = 1.001


@dataclass(frozen=True)
class Solved:
    """The assignment found for a micro-batch (None: nothing fits) and a proven bound on any."""

    assignment: Assignment | None
    lower_bound_s: float

    @property
    def makespan(self) -> float:
        return float("inf") if self.assignment is None else self.assignment.makespan


def solve_by_enumeration(problem: Problem, cluster: ClusterSpec, stop_at: float = np.inf) -> Solved:
    """The best assignment found over partitions of the devices; deterministic.

    Gives up early, with no assignment, once the bound reaches `stop_at`.
    """
    area = area_bound(problem)
    if area >= stop_at:
        return Solved(None, area)
    use = tuple(tuple(int(n) for n in row) for row in problem.use)
    sizes = tuple(int(n) for n in problem.sizes)
    try:
        counts = all_partitions(use, sizes, MAX_PARTITIONS)
        bounder = PartitionBound(problem, counts)
        counts = counts[bounder.passes(np.inf, np.arange(len(counts)), fill=False)]
        if not len(counts):
            return Solved(None, np.inf)
        bounder = PartitionBound(problem, counts)
        time, order = bounder.search(area)
        bound = time if bounder.proven_fill else bounder.count_bound(area)
        ranked = counts[_interleave(_homogeneous(counts), bounder.packed_order(bound), order)]
    except TooManyPartitionsError:
        bound, ranked = aggregated_partitions(problem, area)
    if bound >= stop_at:
        return Solved(None, bound)
    # Dealing few sequences is cheap: then more partitions are tried.
    dealt = min(max(6000 // len(problem.lengths), 24), 400)
    found = None
    for start in range(0, len(ranked), dealt):
        some = [
            row for row in ranked[start : start + dealt] if place(cluster, problem.kinds, row) is not None
        ]
        found = best_of(problem, np.array(some, dtype=np.int64), bound) if some else None
        if found is not None:
            break
    return Solved(found, bound)


def _homogeneous(counts: np.ndarray) -> np.ndarray:
    """Partitions into groups of one kind: a plan is then never worse than a single degree's."""
    return np.flatnonzero((counts > 0).sum(axis=1) == 1)


def _interleave(first: np.ndarray, *orders: np.ndarray) -> np.ndarray:
    """`first`, then one of each order in turn, each partition once."""
    longest = max(map(len, orders))
    turns = [order[i] for i in range(longest) for order in orders if i < len(order)]
    return np.array(list(dict.fromkeys([*first.tolist(), *(int(turn) for turn in turns)])), dtype=np.int64)


def best_of(problem: Problem, counts: np.ndarray, bound: float) -> Assignment | None:
    """Deal and repair in every partition of `counts` [P, K]; the best assignment, or None where nothing
    fits."""
    best: Assignment | None = None
    repaired = min(max(300 // len(problem.lengths), 3), 24)
    for rule, slacks in _PASSES:
        if best is not None and best.makespan <= bound * _GOOD_ENOUGH:
            break
        rows = np.repeat(counts, len(slacks), axis=0)
        target = np.tile(np.array(slacks) * bound, len(counts))
        kind_of, group_of, makespan = deal(problem, rows, rule, target)
        tried: set[tuple[int, ...]] = set()
        for row in np.argsort(makespan, kind="stable"):
            key = tuple(rows[row].tolist())
            if len(tried) == repaired or not np.isfinite(makespan[row]):
                break
            if key in tried:
                continue
            tried.add(key)
            start = assignment(problem, rows[row], kind_of[row, : sum(key)], group_of[row])
            made = repair(problem, start, bound * _GOOD_ENOUGH)
            if best is None or made.makespan < best.makespan:
                best = made
    return best
