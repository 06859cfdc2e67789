"""Local search: the slowest group gives a sequence away, or exchanges one, until nothing helps."""

from __future__ import annotations

import numpy as np

from ltrain.planner.problem import Assignment, Problem, assignment

# Two groups of at most so many sequences together are dealt anew in all ways, with so many partners.
_SUBSET, _PARTNERS = 11, 12


def repair(problem: Problem, start: Assignment, target: float, max_steps: int = 400) -> Assignment:
    """An assignment no slower than `start`, of the same groups; stops at `target`, a local optimum, or
    max_steps.

    Each step takes the slowest group, and of all moves of one of its sequences to another group, and all
    exchanges with a sequence elsewhere, that keep memory, the one that leaves the pair's slower group
    fastest; where none helps and groups are small, any exchange of subsets. A step must shrink the
    slower of the two, so the search ends.
    """
    kind_of, group_of = start.kind_of, start.group_of.copy()
    loads = _loads(problem, kind_of, group_of)
    tokens = np.bincount(group_of, weights=problem.lengths, minlength=len(kind_of)).astype(np.int64)
    capacity = problem.capacity[kind_of]
    times = problem.times[:, kind_of]
    fits = problem.lengths[:, None] <= capacity[None, :]
    own = times[np.arange(len(group_of)), group_of]
    # Members of equal length in one group are equal moves; nothing is lost by trying one of them.
    for _ in range(max_steps):
        slowest = int(loads.argmax())
        most = loads[slowest]
        if most <= target:
            break
        members = np.flatnonzero(group_of == slowest)
        _, first = np.unique(problem.lengths[members], return_index=True)
        members = members[first]
        left = most - own[members]
        better = most * (1 - 1e-9)

        arrive = loads[None, :] + times[members]
        room = fits[members] & (tokens[None, :] + problem.lengths[members, None] <= capacity[None, :])
        pair = np.where(room, np.maximum(arrive, left[:, None]), np.inf)
        pair[:, slowest] = np.inf
        move = np.unravel_index(int(pair.argmin()), pair.shape)
        move_time = float(pair[move])

        # Exchange: a leaves the slowest group for h, b comes from h.
        others = np.flatnonzero(group_of != slowest)
        swap_time = np.inf
        if len(others):
            home = group_of[others]
            a, b = members[:, None], others[None, :]
            here = left[:, None] + times[others, slowest][None, :]
            there = (loads[home] - own[others])[None, :] + times[members][:, home]
            shift = problem.lengths[a] - problem.lengths[b]
            room = (tokens[home][None, :] + shift <= capacity[home][None, :]) & (
                tokens[slowest] - shift <= capacity[slowest]
            )
            swapped = np.where(room, np.maximum(here, there), np.inf)
            swap = np.unravel_index(int(swapped.argmin()), swapped.shape)
            swap_time = float(swapped[swap])
        if min(move_time, swap_time) >= better:
            redealt = _redeal(problem, slowest, group_of, loads, kind_of)
            if redealt is None:
                break
            changes = redealt
        elif move_time <= swap_time:
            changes = [(int(members[move[0]]), int(move[1]))]
        else:
            a_index, b_index = int(members[swap[0]]), int(others[swap[1]])
            changes = [(a_index, int(group_of[b_index])), (b_index, slowest)]
        for sequence, group in changes:
            old = int(group_of[sequence])
            tokens[old] -= problem.lengths[sequence]
            tokens[group] += problem.lengths[sequence]
            group_of[sequence] = group
            own[sequence] = times[sequence, group]
        touched = {slowest, *(group for _, group in changes)}
        for group in touched:
            inside = group_of == group
            loads[group] = (
                own[inside].sum() + problem.fixed[kind_of[group]]
                if inside.any()
                else problem.fixed[kind_of[group]]
            )
    return assignment(problem, start.counts, kind_of, group_of)


def _redeal(
    problem: Problem, slowest: int, group_of: np.ndarray, loads: np.ndarray, kind_of: np.ndarray
) -> list[tuple[int, int]] | None:
    """The best exchange of any subsets between the slowest group and one other of few sequences, as
    (sequence, group).

    All ways to deal the two groups' sequences anew are compared; None where no partner makes the pair faster.
    """
    here = np.flatnonzero(group_of == slowest)
    if len(here) >= _SUBSET:
        return None
    most = loads[slowest]
    best, changes = most * (1 - 1e-9), None
    sizes = np.bincount(group_of, minlength=len(loads))
    partners = [
        g for g in np.argsort(loads, kind="stable") if g != slowest and sizes[g] + len(here) <= _SUBSET
    ]
    for other in partners[:_PARTNERS]:
        items = np.concatenate([here, np.flatnonzero(group_of == other)])
        # Row r of `stay` keeps item i in the slowest group where bit i of r is set.
        stay = (np.arange(1 << len(items))[:, None] >> np.arange(len(items)) & 1).astype(np.float64)
        a, b = int(kind_of[slowest]), int(kind_of[other])
        time_a = stay @ problem.times[items, a] + problem.fixed[a]
        time_b = (1 - stay) @ problem.times[items, b] + problem.fixed[b]
        tokens = stay @ problem.lengths[items]
        fits = (tokens <= problem.capacity[a]) & (
            problem.lengths[items].sum() - tokens <= problem.capacity[b]
        )
        time = np.where(fits, np.maximum(time_a, time_b), np.inf)
        row = int(time.argmin())
        if time[row] < best:
            best = float(time[row])
            changes = [
                (int(i), slowest if keep else int(other)) for i, keep in zip(items, stay[row], strict=True)
            ]
    return changes


def _loads(problem: Problem, kind_of: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """Load of every group, empty ones at their fixed time, which is what a first sequence would add to."""
    own = problem.times[np.arange(len(group_of)), kind_of[group_of]]
    return np.bincount(group_of, weights=own, minlength=len(kind_of)) + problem.fixed[kind_of]
