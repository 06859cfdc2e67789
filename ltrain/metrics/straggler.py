"""Which rank is slow for long enough that it isn't chance."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence


class Straggler:
    """Compares the ranks' own seconds a step: a rank stands out when the fastest rank's median over `window`
    steps is below `threshold` times its own, in `patience` windows in a row.

    The windows follow one another without overlap. On a machine with other work one window in seven named a
    rank that was as fast as the rest; three in a row did not.
    """

    def __init__(self, *, window: int = 20, threshold: float = 0.7, patience: int = 3) -> None:
        self.window, self.threshold, self.patience = window, threshold, patience
        self._seconds: deque[Sequence[float]] = deque(maxlen=window)
        self._candidate, self._in_a_row = -1, 0
        self.rank = -1

    def add(self, seconds: Sequence[float]) -> bool:
        """Take one step's seconds by rank, without time spent waiting for others. Returns whether `rank`, the
        rank that stands out (-1: none), has changed.
        """
        self._seconds.append(tuple(seconds))
        if len(self._seconds) < self.window:
            return False
        medians = [statistics.median(column) for column in zip(*self._seconds, strict=True)]
        self._seconds.clear()
        slowest = max(range(len(medians)), key=medians.__getitem__)
        stands_out = min(medians) < self.threshold * medians[slowest]
        self._in_a_row = self._in_a_row + 1 if stands_out and slowest == self._candidate else int(stands_out)
        self._candidate = slowest if stands_out else -1
        before, self.rank = self.rank, slowest if self._in_a_row >= self.patience else -1
        return self.rank != before
