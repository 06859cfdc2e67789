"""The aggregated program: how many groups of each kind, with sequences as a fluid.

Where the partitions are too many to list (beyond about 128 devices, any degrees, unequal devices) a small
integer program over group counts gives both a bound and the partitions worth trying. Integers are the counts
n_k; shares x_qk >= 0 pour bucket q into kind k:

    sum_k x_qk = size of bucket q          sum_q x_qk time_qk <= n_k (C - fixed_k)
    sum_q x_qk length_q <= n_k capacity_k  sum_k n_k use_ki <= sizes_i
    for each length: groups hold as many sequences at least that long as there are (rounded down per group)

Buckets count with their shortest length, so that the program is a relaxation, and C is found by bisection.
"""

from __future__ import annotations

import numpy as np
import pulp

from ltrain.planner.bounds import least_time
from ltrain.planner.buckets import bucketize
from ltrain.planner.problem import Problem
from ltrain.planner.program import solve_program

_HEAD, _BUCKETS = 24, 24
_PRECISION = 2e-3


def aggregated_partitions(
    problem: Problem, low: float, precision: float = _PRECISION
) -> tuple[float, np.ndarray]:
    """A proven bound, and partitions [P, K] to try, best first."""
    found: dict[tuple[int, ...], float] = {}

    def suffices(time: float) -> bool:
        counts = _counts_within(problem, time)
        if counts is not None:
            found[counts] = min(time, found.get(counts, np.inf))
        return counts is not None

    bound = least_time(suffices, low, precision)
    # Somewhat later times leave room for whole sequences.
    for slack in (1.004, 1.01, 1.02, 1.04):
        suffices(bound * slack)
    # Buckets counted with their longest sequence ask for groups that every one of them fits: no bound, good
    # counts.
    ranked: dict[tuple[int, ...], None] = {}
    for slack in (1.002, 1.006, 1.012, 1.02, 1.04):
        counts = _counts_within(problem, bound * slack, careful=True)
        if counts is not None:
            ranked[fill_up(problem, counts)] = None
    seeds = sorted(found, key=lambda counts: (found[counts], counts))
    for seed in seeds:
        filled = fill_up(problem, seed)
        ranked[filled] = None
    for seed in list(ranked)[:6]:
        for neighbour in _neighbours(problem, seed):
            ranked[neighbour] = None
    return bound, np.array(list(ranked), dtype=np.int64).reshape(len(ranked), len(problem.kinds))


def _buckets(problem: Problem) -> list[np.ndarray]:
    """The longest sequences each on its own, for they decide which groups there must be; the others in
    buckets."""
    head = min(_HEAD + len(problem.lengths) // 57, len(problem.lengths))
    singles = [np.array([i]) for i in range(head)]
    if head == len(problem.lengths):
        return singles
    rest = bucketize(problem.lengths[head:], _BUCKETS + len(problem.lengths) // 256)
    return singles + [members + head for members in rest.members[::-1]]


def aggregated_bound(problem: Problem, low: float, precision: float = 5e-4) -> float:
    """The bound alone; at least `low`, which must be a bound itself."""
    return least_time(lambda time: _counts_within(problem, time) is not None, low, precision)


def _counts_within(problem: Problem, time: float, careful: bool = False) -> tuple[int, ...] | None:
    """Group counts with which the relaxation finishes within `time`, using the fewest devices; None if none
    do.

    In a bucket the least length and times stand for all; with `careful`, the greatest length and the mean
    times, which is no relaxation but asks for groups that every sequence fits.
    """
    buckets = _buckets(problem)
    # Positions are descending in length.
    pick = 0 if careful else -1
    length = problem.lengths[np.array([members[pick] for members in buckets])]
    size = np.array([len(members) for members in buckets])
    reduce = np.mean if careful else np.min
    low = np.stack([reduce(problem.low[members], axis=0) for members in buckets])
    slowest = np.stack([problem.low[members].max(axis=0) for members in buckets]) if careful else low
    room = time - problem.low_fixed
    able = (length[:, None] <= problem.capacity[None, :]) & (slowest <= room[None, :] * (1 + 1e-9))
    if not able.any(axis=1).all():
        return None
    model = pulp.LpProblem("counts", pulp.LpMinimize)
    most = [min(int(s // u) for s, u in zip(problem.sizes, use, strict=True) if u) for use in problem.use]
    kinds = range(len(problem.kinds))
    n = [pulp.LpVariable(f"n{k}", 0, most[k], pulp.LpInteger) for k in kinds]
    x = {(q, k): pulp.LpVariable(f"x{q}_{k}", 0) for q in range(len(size)) for k in kinds if able[q, k]}
    devices = problem.use.sum(axis=1)
    model += pulp.lpSum(int(devices[k]) * n[k] for k in kinds)
    for q in range(len(size)):
        model += pulp.lpSum(x[q, k] for k in kinds if able[q, k]) == int(size[q])
    for k in kinds:
        inside = [q for q in range(len(size)) if able[q, k]]
        if inside:
            scale = 1.0 / float(room[k])
            model += pulp.lpSum(float(low[q, k]) * scale * x[q, k] for q in inside) <= n[k]
            full = 1.0 / float(problem.capacity[k])
            model += pulp.lpSum(float(length[q]) * full * x[q, k] for q in inside) <= n[k]
            for share in (low[inside, k] / room[k], length[inside] / problem.capacity[k]):
                for weight in dual_feasible(share):
                    model += (
                        pulp.lpSum(float(w) * x[q, k] for q, w in zip(inside, weight, strict=True)) <= n[k]
                    )
    for i, total in enumerate(problem.sizes):
        model += pulp.lpSum(int(problem.use[k, i]) * n[k] for k in kinds) <= int(total)
    if problem.falling and not careful:
        at_least = np.searchsorted(-problem.lengths, -length, side="right")
        for q in range(len(size)):
            hold = np.minimum(problem.capacity // length[q], np.floor(room / low[q] * (1 + 1e-9)))
            model += pulp.lpSum(int(max(hold[k], 0)) * n[k] for k in kinds) >= int(at_least[q])
    outcome = solve_program(model, None, 1e-3)
    if outcome.status == "infeasible":
        return None
    return tuple(round(n[k].value() or 0) for k in kinds)


def dual_feasible(share: np.ndarray) -> list[np.ndarray]:
    """Weights of items that take `share` of a bin, under functions whose sum is at most 1 in any bin that
    holds them.

    u_m(x) = x where (m+1) x is an integer, else floor((m+1) x) / m, for m = 1..4; and, for several e, 1 above
    1 - e, 0 below e, x between (Fekete and Schepers, "New classes of fast lower bounds for bin packing
    problems", 2001). Functions that weigh nothing more than its share are left out.
    """
    x = np.minimum(share, 1.0)
    weights = []
    for m in (1, 2, 3, 4):
        scaled = (m + 1) * x
        whole = np.abs(scaled - np.round(scaled)) < 1e-9
        weights.append(np.where(whole, x, np.floor(scaled) / m))
    for e in (0.1, 0.2, 0.3, 0.4):
        weights.append(np.where(x > 1 - e + 1e-9, 1.0, np.where(x < e - 1e-9, 0.0, x)))
    return [weight for weight in weights if np.any(weight > x + 1e-9)]


def fill_up(problem: Problem, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Counts with idle devices put to use: groups of the kinds in use first, then any that fit, largest
    first."""
    made = list(counts)
    free = problem.sizes - np.array(counts) @ problem.use
    order = [k for k in range(len(made)) if counts[k]] + [k for k in range(len(made)) if not counts[k]]
    for k in order:
        extra = min(int(room // need) for room, need in zip(free, problem.use[k], strict=True) if need)
        made[k] += extra
        free = free - extra * problem.use[k]
    return tuple(made)


def _neighbours(problem: Problem, counts: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Counts with one or two groups less of a kind, the devices given to another kind."""
    near: list[tuple[int, ...]] = []
    for k, count in enumerate(counts):
        if not count:
            continue
        for less in {1, 2} if count > 1 else {1}:
            base = list(counts)
            base[k] -= less
            free = problem.sizes - np.array(base) @ problem.use
            for other in range(len(counts)):
                if other == k:
                    continue
                extra = min(int(r // u) for r, u in zip(free, problem.use[other], strict=True) if u)
                if extra:
                    made = list(base)
                    made[other] += extra
                    near.append(fill_up(problem, tuple(made)))
    return near
