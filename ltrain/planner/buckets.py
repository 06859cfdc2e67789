"""Grouping lengths into buckets by dynamic programming (arXiv 2412.01523, section 4.1.3)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Buckets:
    """`members[q]` are positions of the sequences of bucket q; its length is the longest (`upper`) or
    shortest one."""

    members: tuple[np.ndarray, ...]
    upper: np.ndarray
    lower: np.ndarray
    error_tokens: int

    @property
    def counts(self) -> np.ndarray:
        return np.array([len(member) for member in self.members])


def bucketize(lengths: np.ndarray, num_buckets: int) -> Buckets:
    """Buckets of consecutive lengths with the least total of (bucket maximum - length), exactly.

    err[k][q] = min over j<k of err[j][q-1] + n(j, k) * x_k - sum(j, k), over distinct lengths x with prefix
    counts and sums. No error at all where there are no more distinct lengths than buckets.
    """
    values, inverse, repeat = np.unique(lengths, return_inverse=True, return_counts=True)
    n = len(values)
    q_max = min(num_buckets, n)
    count = np.concatenate([[0], np.cumsum(repeat)]).astype(np.int64)
    total = np.concatenate([[0], np.cumsum(values * repeat)]).astype(np.int64)
    # waste[j, k]: padding of values j..k-1 to the maximum, value k-1
    waste = (count[None, 1:] - count[:-1, None]) * values[None, :] - (total[None, 1:] - total[:-1, None])
    waste = np.where(np.arange(n)[:, None] <= np.arange(n)[None, :], waste, np.iinfo(np.int64).max // 4)
    error = np.concatenate([[0], np.full(n, np.iinfo(np.int64).max // 4)])
    choice = np.zeros((q_max, n), dtype=np.int64)
    for q in range(q_max):
        candidates = error[:-1, None] + waste
        choice[q] = np.argmin(candidates, axis=0)
        error = np.concatenate([[np.iinfo(np.int64).max // 4], candidates[choice[q], np.arange(n)]])
    ends, k = [n], n
    for q in reversed(range(q_max)):
        k = int(choice[q, k - 1])
        ends.append(k)
    ends = ends[::-1]
    members = tuple(np.flatnonzero((inverse >= a) & (inverse < b)) for a, b in itertools.pairwise(ends))
    upper = np.array([values[b - 1] for b in ends[1:]])
    lower = np.array([values[a] for a in ends[:-1]])
    return Buckets(members, upper, lower, int(error[n]))
