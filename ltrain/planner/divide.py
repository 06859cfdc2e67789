"""Cutting a batch into micro-batches.

Sequences sorted by length are cut into consecutive runs with the largest token sum as small as possible
(arXiv 2412.01523, section 4.2): few micro-batches, little variance inside one, even memory.
"""

from __future__ import annotations

import numpy as np


def divide(lengths: np.ndarray, parts: int) -> list[tuple[int, int]]:
    """Runs (start, stop) over `lengths` [S], at most `parts` of them, with the least possible largest sum.

    Of the divisions with that largest sum, the one whose rest, after its first run, is again divided so: one
    very long document does not leave the others uneven. Greedy filling is optimal for a given largest sum, so
    a binary search finds the least.
    """
    runs: list[tuple[int, int]] = []
    start = 0
    while start < len(lengths):
        rest = lengths[start:]
        stop = start + _first_run(rest, max(parts - len(runs), 1))
        runs.append((start, stop))
        start = stop
    return runs


def _first_run(lengths: np.ndarray, parts: int) -> int:
    low, high = int(lengths.max()), int(lengths.sum())
    cumulative = np.concatenate([[0], np.cumsum(lengths)])
    while low < high:
        middle = (low + high) // 2
        if len(_cut(cumulative, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    return _cut(cumulative, low)[0][1]


def _cut(cumulative: np.ndarray, largest: int) -> list[tuple[int, int]]:
    runs, start, end = [], 0, len(cumulative) - 1
    while start < end:
        stop = int(np.searchsorted(cumulative, cumulative[start] + largest, side="right")) - 1
        runs.append((start, stop))
        start = stop
    return runs
