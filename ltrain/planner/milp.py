"""The integer program of arXiv 2412.01523, section 4.1.2, in PuLP.

Virtual groups p: as many of each kind as the devices allow. m_p: group is used; A_qp: sequences of bucket q
in group p.

    minimise C                       sum_p A_qp = n_q
    sum_q A_qp time_qp + fixed_p <= C + (unused: free)
    sum_q A_qp length_q <= capacity_p m_p
    sum_p use_pi m_p <= sizes_i      m_p >= m_p+1 among groups of one kind

Sequences are bucketed only where there are many. Bucket maxima count as time, bucket means as memory (maxima
would refuse tight packings that exist); true lengths decide afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pulp

from ltrain.planner.buckets import Buckets, bucketize
from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.kinds import place
from ltrain.planner.problem import Assignment, Problem, assignment
from ltrain.planner.program import Status, solve_program
from ltrain.planner.repair import repair

NUM_BUCKETS = 16
# Sequence variables up to which every sequence has its own bucket.
EXACT_SEQUENCES = 24


@dataclass(frozen=True)
class Milp:
    """What the program gave: `lower_bound_s` is proven for true lengths (0 where buckets were used)."""

    assignment: Assignment | None
    lower_bound_s: float
    status: Status
    solver: str


def solve_by_program(
    problem: Problem,
    cluster: ClusterSpec,
    warm: Assignment | None,
    time_limit_s: float | None,
    *,
    prefer: str = "highs",
    num_buckets: int = NUM_BUCKETS,
) -> Milp:
    """Solve one micro-batch, from `warm` if given; the better of the two after local repair."""
    exact = len(problem.lengths) <= EXACT_SEQUENCES
    buckets = bucketize(problem.lengths, len(problem.lengths) if exact else num_buckets)
    groups = _virtual_groups(problem)
    model, a, m, span = _build(problem, buckets, groups)
    if warm is not None:
        _set_start(problem, buckets, groups, warm, a, m, span)
    outcome = solve_program(model, time_limit_s, 1e-4, warm=warm is not None, prefer=prefer)
    found: Assignment | None = None
    if outcome.status in ("optimal", "feasible"):
        found = _decode(problem, buckets, groups, a)
        if found is not None and place(cluster, problem.kinds, found.counts) is None:
            found = None
    if found is not None:
        found = repair(problem, found, 0.0)
    bound = 0.0
    if exact and np.array_equal(problem.low, problem.times):
        if outcome.bound is not None:
            bound = outcome.bound
        elif outcome.status == "optimal" and found is not None:
            bound = float(span.value()) * (1 - 1e-4)
    if warm is not None and (found is None or warm.makespan <= found.makespan):
        found = warm
    return Milp(found, max(bound, 0.0), outcome.status, outcome.solver)


def _virtual_groups(problem: Problem) -> np.ndarray:
    """Kind of every virtual group, int [G]; never more of a kind than there are sequences that fit it."""
    groups: list[int] = []
    for k, use in enumerate(problem.use):
        copies = min(int(s // u) for s, u in zip(problem.sizes, use, strict=True) if u)
        groups += [k] * min(copies, int(problem.fits[:, k].sum()))
    return np.array(groups, dtype=np.int64)


def _build(
    problem: Problem, buckets: Buckets, groups: np.ndarray
) -> tuple[pulp.LpProblem, dict[tuple[int, int], pulp.LpVariable], list[pulp.LpVariable], pulp.LpVariable]:
    model = pulp.LpProblem("micro_batch", pulp.LpMinimize)
    longest = [int(members[0]) for members in buckets.members]
    mean = [float(problem.lengths[members].mean()) for members in buckets.members]
    span = pulp.LpVariable("C", 0)
    m = [pulp.LpVariable(f"m{p}", 0, 1, pulp.LpInteger) for p in range(len(groups))]
    a = {}
    for q, n in enumerate(buckets.counts):
        for p, k in enumerate(groups):
            hold = min(int(n), int(problem.capacity[k] // problem.lengths[buckets.members[q][-1]]))
            if hold and problem.fits[longest[q], k]:
                a[q, p] = pulp.LpVariable(f"a{q}_{p}", 0, hold, pulp.LpInteger)
    model += span
    for q, n in enumerate(buckets.counts):
        model += pulp.lpSum(a[q, p] for p in range(len(groups)) if (q, p) in a) == int(n)
    for p, k in enumerate(groups):
        inside = [q for q in range(len(mean)) if (q, p) in a]
        time = pulp.lpSum(float(problem.times[longest[q], k]) * a[q, p] for q in inside)
        model += time + float(problem.fixed[k]) * m[p] <= span
        model += pulp.lpSum(mean[q] / float(problem.capacity[k]) * a[q, p] for q in inside) <= m[p]
        if p and groups[p - 1] == k:
            model += m[p - 1] >= m[p]
    for i, size in enumerate(problem.sizes):
        model += pulp.lpSum(int(problem.use[k, i]) * m[p] for p, k in enumerate(groups)) <= int(size)
    return model, a, m, span


def _set_start(
    problem: Problem,
    buckets: Buckets,
    groups: np.ndarray,
    warm: Assignment,
    a: dict[tuple[int, int], pulp.LpVariable],
    m: list[pulp.LpVariable],
    span: pulp.LpVariable,
) -> None:
    for variable in [*a.values(), *m, span]:
        variable.setInitialValue(0, check=False)
    slots = {int(k): [p for p in range(len(groups)) if groups[p] == k] for k in set(warm.kind_of.tolist())}
    slot_of: dict[int, int] = {}
    for g in np.unique(warm.group_of):
        slot_of[int(g)] = slots[int(warm.kind_of[g])].pop(0)
        m[slot_of[int(g)]].setInitialValue(1)
    worst = 0.0
    for p, k in ((slot_of[int(g)], int(warm.kind_of[g])) for g in slot_of):
        g = next(key for key, value in slot_of.items() if value == p)
        load = float(problem.fixed[k])
        for q, members in enumerate(buckets.members):
            here = int((warm.group_of[members] == g).sum())
            if here and (q, p) in a:
                a[q, p].setInitialValue(here, check=False)
                load += here * float(problem.times[members[0], k])
        worst = max(worst, load)
    span.setInitialValue(worst, check=False)


def _decode(
    problem: Problem, buckets: Buckets, groups: np.ndarray, a: dict[tuple[int, int], pulp.LpVariable]
) -> Assignment | None:
    """True sequences for the counts found, longest to the group with most room; None where memory does not
    hold."""
    group_of = np.full(len(problem.lengths), -1, dtype=np.int64)
    free = problem.capacity[groups].copy()
    for q, members in enumerate(buckets.members):
        left = {p: round(a[q, p].value() or 0) for p in range(len(groups)) if (q, p) in a}
        for s in members:
            open_ = [p for p, n in left.items() if n > 0]
            if not open_:
                return None
            p = max(open_, key=lambda p: (free[p], -p))
            left[p] -= 1
            free[p] -= problem.lengths[s]
            group_of[s] = p
    if (free < 0).any():
        return None
    used, compact = np.unique(group_of, return_inverse=True)
    kind_of = groups[used]
    counts = np.bincount(kind_of, minlength=len(problem.kinds))
    return assignment(problem, counts.tolist(), kind_of, compact)
