"""Dealing sequences, longest first, to the groups of many partitions at once."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ltrain.planner.problem import Problem

Rule = Literal["earliest", "fill", "best_fit"]


def deal(
    problem: Problem, counts: np.ndarray, rule: Rule, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group of every sequence in every partition of `counts` [P, K], with a `target` time [P] for each.

    Returns (kind_of [P, G], group_of [P, S], makespan [P], inf where something did not fit). Rules:

    - `earliest`: the group that would finish first (longest processing time first).
    - `fill`: the fullest group of the largest kind that still finishes within `target`; else as `earliest`.
      This follows the optimal fractional assignment.
    - `best_fit`: the group with the least memory left over among those within `target`; else among all.
    Groups without room in memory are never taken.
    """
    num_partitions, num_kinds = counts.shape
    width = int(counts.sum(axis=1).max())
    kind_of = np.full((num_partitions, width), num_kinds, dtype=np.int64)
    for row in range(num_partitions):
        kinds = np.repeat(np.arange(num_kinds), counts[row])
        kind_of[row, : len(kinds)] = kinds
    capacity = np.append(problem.capacity, -1)
    free = capacity[kind_of]
    fixed = np.append(problem.fixed, np.inf)
    finish = fixed[kind_of]
    group_of = np.zeros((num_partitions, len(problem.lengths)), dtype=np.int64)
    failed = np.zeros(num_partitions, dtype=bool)
    rows = np.arange(num_partitions)
    times = np.concatenate([problem.times, np.full((len(problem.times), 1), np.inf)], axis=1)
    # One key per group, smaller is better; kinds are ordered from the largest degree down.
    within = target[:, None]
    step = 4.0 * float(target.max())
    kind_key = kind_of * step
    big = step * (num_kinds + 2)
    for s, length in enumerate(problem.lengths.tolist()):
        done = finish + times[s][kind_of]
        if rule == "earliest":
            key = done
        elif rule == "fill":
            key = np.where(done <= within, kind_key - done, done + big)
        else:
            key = free + np.where(done <= within, 0.0, 1e15)
        key = np.where(free >= length, key, np.inf)
        choice = key.argmin(axis=1)
        failed |= ~np.isfinite(key[rows, choice])
        group_of[:, s] = choice
        finish[rows, choice] = done[rows, choice]
        free[rows, choice] -= length
    used = np.zeros((num_partitions, width), dtype=bool)
    used[rows[:, None], group_of] = True
    makespan = np.where(used, finish, 0.0).max(axis=1)
    return kind_of, group_of, np.where(failed, np.inf, makespan)
