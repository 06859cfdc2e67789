"""Times that no assignment can beat.

Every bound is a test "may this much time suffice?" that only says no when it is certain, and a search for the
least time that passes. Legend as in `problem`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ltrain.planner.problem import Problem

# Relative width at which the search for a bound stops.
_PRECISION = 3e-4
_THRESHOLDS = 32
# Times, relative to the bound, at which partitions are tried by packed times, and how many are enough.
_PACKED_SLACKS = (1.0, 1.01, 1.02, 1.035, 1.05, 1.075, 1.1, 1.15, 1.2, 1.3)
_PACKED_ENOUGH = 64
# Partitions ordered beyond those that pass the bound itself.
_ENOUGH = 512


def area_bound(problem: Problem) -> float:
    """Least makespan if work could be spread over devices like a fluid.

    In time C a group of kind k has C - fixed[k] on use[k] devices, so sum_s min_k price[k] * low[s, k] over
    the kinds in which s fits memory and time is at most sum_i price_i sizes_i (C - min fixed), for any
    prices; one device has one price, and one speed, are tried.
    """
    prices = [np.ones(len(problem.sizes))]
    if len(problem.sizes) > 1:
        solo = problem.use.sum(axis=1) == problem.use.max(axis=1)
        speed = [
            1.0
            / min(
                (
                    k.compute_scale * k.degree
                    for k, s in zip(problem.kinds, solo, strict=True)
                    if s and k.use[i]
                ),
                default=1.0,
            )
            for i in range(len(problem.sizes))
        ]
        prices.append(np.array(speed))
    least = float(problem.low_fixed.min())
    start = float(problem.solo.max())
    best = start
    for price in prices:
        area = problem.low * (problem.use @ price)[None, :]
        total = float(problem.sizes @ price)

        def suffices(time: float, area: np.ndarray = area, total: float = total) -> bool:
            open_ = problem.fits & (problem.low + problem.low_fixed <= time * (1 + 1e-12))
            cheapest = np.where(open_, area, np.inf).min(axis=1)
            return bool(cheapest.sum() <= total * (time - least))

        best = max(best, least_time(suffices, start, _PRECISION))
    return best


def least_time(suffices: object, low: float, precision: float) -> float:
    """A time within `precision` below the least one that `suffices`, which must be monotone. Starts at
    `low`."""
    test = suffices
    assert callable(test)
    if test(low):
        return low
    step = 0.02
    high = low * (1 + step)
    while not test(high):
        low, step = high, step * 2
        high = low * (1 + step)
    while high - low > precision * high:
        middle = (low + high) / 2
        if test(middle):
            high = middle
        else:
            low = middle
    return low


@dataclass
class PartitionBound:
    """Bounds all partitions of `counts` [P, K] at once.

    Two tests per partition. *Fill*: sequences, longest first, are poured into the kinds, largest first, with
    n_k (C - fixed_k) seconds each; exact for divisible sequences when the problem is a chain. *Count*: a
    group of kind k holds at most min(memory / s, (C - fixed_k) / time(s)) sequences at least as long as s,
    rounded down; the groups together must hold as many as there are.
    """

    problem: Problem
    counts: np.ndarray

    def __post_init__(self) -> None:
        p = self.problem
        # A sequence too long for a kind costs nothing there: the fill refuses it by position.
        self._cumulative = np.concatenate([np.zeros((1, len(p.kinds))), np.cumsum(p.low, axis=0)])
        s = len(p.lengths)
        rows = np.unique(np.linspace(0, s - 1, min(s, _THRESHOLDS)).astype(np.int64))
        # The last sequence of each run of equal lengths gives the strongest test.
        self._rows = np.unique(np.searchsorted(-p.lengths, -p.lengths[rows], side="right") - 1)
        self._by_memory = p.capacity[None, :] // p.lengths[self._rows, None]
        self.proven_fill = p.is_chain

    def passes(self, time: float, rows: np.ndarray, fill: bool = True) -> np.ndarray:
        """Whether partitions `rows` may finish within `time`, bool [len(rows)]."""
        p, counts = self.problem, self.counts[rows]
        room = np.maximum(time - p.low_fixed, 0.0)
        hold = self._by_memory
        if p.falling:
            by_time = np.floor(room[None, :] / p.low[self._rows] * (1 + 1e-9) + 1e-9)
            hold = np.minimum(hold, by_time)
        # Counts are small integers: exact in floats, and the product then runs in BLAS.
        good = np.all(counts.astype(np.float64) @ hold.T.astype(np.float64) >= self._rows + 1, axis=1)
        if fill and good.any():
            good[good] = self._fills(time, counts[good], room, self._cumulative)
        return good

    def packed_order(self, low: float) -> np.ndarray:
        """Partitions that a fill by packed times passes, by the time at which they do; a heuristic, no bound.

        A packed time counts a sequence with its share of what its group can hold of its like, the room
        between whole sequences included; the truth lies between it and the plain time, where their mean is
        taken.
        """
        p = self.problem
        rest = np.arange(len(self.counts))
        passed: list[np.ndarray] = []
        for slack in _PACKED_SLACKS:
            time = low * slack
            room = np.maximum(time - p.low_fixed, 0.0)
            hold = np.minimum(
                p.capacity[None, :] // p.lengths[:, None], np.floor(room[None, :] / p.low + 1e-9)
            )
            packed = (p.low + room[None, :] / np.maximum(hold, 1.0)) / 2
            cumulative = np.concatenate([np.zeros((1, len(p.kinds))), np.cumsum(packed, axis=0)])
            good = self._fills(time, self.counts[rest], room, cumulative)
            passed.append(rest[good])
            rest = rest[~good]
            if sum(map(len, passed)) >= _PACKED_ENOUGH:
                break
        return np.concatenate(passed)

    def _fills(self, time: float, counts: np.ndarray, room: np.ndarray, sums: np.ndarray) -> np.ndarray:
        p = self.problem
        end = float(len(p.lengths))
        position = np.zeros(len(counts))
        good = np.ones(len(counts), dtype=bool)
        steps = np.arange(end + 1)
        able = p.fits & (p.low + p.low_fixed <= time * (1 + 1e-12))
        # Whether this kind or a later, smaller one can take the sequence: if none can, it must be placed
        # already.
        onward = np.logical_or.accumulate(able[:, ::-1], axis=1)[:, ::-1]
        for k in range(len(p.kinds)):
            present = counts[:, k] > 0
            unable = np.flatnonzero(~onward[:, k])
            good &= ~(present & (position < (unable[-1] + 1 if len(unable) else 0) - 1e-9))
            cumulative = sums[:, k]
            reached = np.interp(position, steps, cumulative) + counts[:, k] * room[k]
            position = np.where(present & good, np.interp(reached * (1 + 1e-12), cumulative, steps), position)
        return good & (position >= end - 1e-6)

    def search(self, low: float) -> tuple[float, np.ndarray]:
        """The least time that any partition passes, and partitions ordered by when they fail, best first.

        The time is a proven bound over these partitions if `proven_fill`; otherwise the order is a heuristic,
        and the caller uses `count_bound`.
        """
        alive = np.arange(len(self.counts))
        time, step = low, 0.01
        passed = self.passes(time, alive)
        while not passed.any():
            low, time, step = time, time * (1 + step), step * 1.6
            passed = self.passes(time, alive)
        late: list[np.ndarray] = []
        rest = alive[~passed]
        for slack in (1.03, 1.1, 1.3, np.inf):
            in_time = (
                self.passes(time * slack, rest) if np.isfinite(slack) else np.ones(len(rest), dtype=bool)
            )
            late.append(rest[in_time])
            rest = rest[~in_time]
            if sum(map(len, late)) > _ENOUGH:
                break
        tiers = late[::-1]
        alive, high = alive[passed], time
        while high - low > _PRECISION * high:
            middle = (low + high) / 2
            passed = self.passes(middle, alive)
            if passed.any():
                tiers.append(alive[~passed])
                alive, high = alive[passed], middle
            else:
                low = middle
        tiers.append(alive)
        return low, np.concatenate(tiers[::-1])

    def count_bound(self, low: float) -> float:
        """The least time that passes the count test alone in some partition: proven for any problem."""
        rows = np.arange(len(self.counts))
        return least_time(lambda time: bool(self.passes(time, rows, fill=False).any()), low, _PRECISION)
