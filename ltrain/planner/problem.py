"""One micro-batch as arrays: what every solver works on.

Legend: S sequences, longest first; K kinds of group; I islands; P partitions; G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.cost import CostModel
from ltrain.planner.kinds import GroupKind, group_kinds


@dataclass(frozen=True)
class Assignment:
    """Groups of one micro-batch: `counts` [K], `kind_of` [G], `group_of` [S]; `loads` [G] seconds, 0 where
    empty."""

    counts: tuple[int, ...]
    kind_of: np.ndarray
    group_of: np.ndarray
    loads: np.ndarray

    @property
    def makespan(self) -> float:
        return float(self.loads.max()) if len(self.loads) else 0.0


@dataclass(frozen=True)
class Problem:
    """Sequences `lengths` [S], longest first, and what they cost in each of `kinds`.

    `times` [S, K] and `fixed` [K] are under the one schedule per kind in `schedules`; `low` [S, K] and
    `low_fixed` [K] are the least over schedules, for bounds. `capacity` [K] tokens, `use` [K, I] devices,
    `sizes` [I] devices there are.
    """

    lengths: np.ndarray
    kinds: tuple[GroupKind, ...]
    schedules: tuple[str, ...]
    times: np.ndarray
    fixed: np.ndarray
    low: np.ndarray
    low_fixed: np.ndarray
    capacity: np.ndarray
    use: np.ndarray
    sizes: np.ndarray

    @cached_property
    def fits(self) -> np.ndarray:
        """Whether a sequence fits a kind's memory, bool [S, K]."""
        return self.lengths[:, None] <= self.capacity[None, :]

    @cached_property
    def first_fitting(self) -> np.ndarray:
        """Index of the longest sequence that fits each kind [K]; all shorter ones fit too."""
        return np.searchsorted(-self.lengths, -self.capacity, side="left")

    @cached_property
    def falling(self) -> bool:
        """Times never rise from a sequence to a shorter one, in any kind."""
        return bool(np.all(np.diff(self.low, axis=0) <= 1e-12))

    @cached_property
    def is_chain(self) -> bool:
        """Longer sequences lose relatively less in larger groups, for every pair of neighbouring kinds.

        Then filling the groups from the largest kind down with sequences from the longest down is an optimal
        fractional assignment, whatever the counts: an exchange argument over pairs of sequences.
        """
        if len(self.sizes) > 1 or not self.falling:
            return False
        if np.any(np.diff(self.capacity) > 0):
            return False
        ratio = self.low[:, :-1] / self.low[:, 1:]
        return bool(np.all(np.diff(ratio, axis=0) >= -1e-9))

    @cached_property
    def solo(self) -> np.ndarray:
        """Least time of each sequence when alone in a group [S]."""
        return np.where(self.fits, self.low + self.low_fixed, np.inf).min(axis=1)


class BatchTable:
    """Costs of a whole batch in every kind and schedule, cut into problems by `problem`.

    Raises ConfigError naming the longest sequence when it fits no group.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        cluster: ClusterSpec,
        cost: CostModel,
        degrees: str | Sequence[int] = "powers_of_two",
        block: int = 1,
    ) -> None:
        if not len(lengths):
            raise ConfigError("lengths", 0, "must hold at least one sequence")
        bad = [int(length) for length in lengths if length < 1]
        if bad:
            raise ConfigError("lengths", bad[0], "must be 1 or more")
        self.cluster, self.cost = cluster, cost
        kinds = group_kinds(cluster, cost.tokens_by_island(cluster), degrees, block)
        self.kinds = tuple(kind for kind in kinds if cost.schedules_for(kind))
        self.capacity = np.array([kind.capacity for kind in self.kinds], dtype=np.int64)
        self.order = np.array(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)), dtype=np.int64)
        self.lengths = np.asarray(lengths, dtype=np.int64)[self.order]
        self._refuse_oversized(int(self.order[0]))
        self.sizes = np.array([island.size for island in cluster.islands], dtype=np.int64)
        self.use = np.array([kind.use for kind in self.kinds], dtype=np.int64)
        # Total tokens that can be held at once: every device full. Mixed kinds never hold more.
        single = [
            max((k.capacity / k.degree for k in self.kinds if k.use[i] == k.degree), default=0.0)
            for i in range(len(self.sizes))
        ]
        self.cluster_tokens = int(np.dot(single, self.sizes))
        self._tables: list[dict[str, tuple[np.ndarray, float]]] = []
        for kind in self.kinds:
            tables = {}
            for schedule in cost.schedules_for(kind):
                terms = cost.terms(kind, self.lengths, schedule)
                tables[schedule] = (terms.total, terms.fixed + terms.latency)
            self._tables.append(tables)

    def problem(self, start: int, stop: int, order: np.ndarray | None = None) -> Problem:
        """The micro-batch of sorted sequences start..stop-1, or of the sorted positions `order`."""
        rows = np.arange(start, stop) if order is None else order
        lengths = self.lengths[rows]
        keep = [k for k in range(len(self.kinds)) if self.capacity[k] >= lengths[-1]]
        times, fixed, low, low_fixed, schedules = [], [], [], [], []
        for k in keep:
            tables = self._tables[k]
            fit = lengths <= self.capacity[k]
            best = min(tables, key=lambda name: float(tables[name][0][rows][fit].sum()) + tables[name][1])
            times.append(tables[best][0][rows])
            fixed.append(tables[best][1])
            low.append(
                times[-1] if len(tables) == 1 else np.min([t[0][rows] for t in tables.values()], axis=0)
            )
            low_fixed.append(min(t[1] for t in tables.values()))
            schedules.append(best)
        return Problem(
            lengths,
            tuple(self.kinds[k] for k in keep),
            tuple(schedules),
            np.stack(times, axis=1),
            np.array(fixed),
            np.stack(low, axis=1),
            np.array(low_fixed),
            self.capacity[keep],
            self.use[keep],
            self.sizes,
        )

    def best_schedule(self, kind: GroupKind, rows: np.ndarray) -> tuple[str, float]:
        """The schedule with the least time for these sorted positions in one group, and that time."""
        tables = self._tables[self.kinds.index(kind)]
        times = {name: float(times[rows].sum()) + fixed for name, (times, fixed) in tables.items()}
        best = min(times, key=lambda name: times[name])
        return best, times[best]

    def _refuse_oversized(self, index: int) -> None:
        longest = int(self.lengths[0])
        room = int(self.capacity.max()) if len(self.capacity) else 0
        if longest <= room:
            return
        need = f"{longest} tokens of activations"
        if self.cost.memory is not None:
            gib = longest * self.cost.memory.bytes_per_token[self.cost.memory.level] / 2**30
            need = f"{gib:.1f} GiB of activations"
        raise ConfigError(
            f"lengths[{index}]",
            longest,
            f"needs {need}, more than any group holds; the longest sequence that fits has {room} tokens",
            "shorten the document, add devices, or keep less for the backward",
        )


def assignment(
    problem: Problem, counts: Sequence[int], kind_of: np.ndarray, group_of: np.ndarray
) -> Assignment:
    """An assignment with its loads worked out from the problem."""
    sums = np.bincount(
        group_of, weights=problem.times[np.arange(len(group_of)), kind_of[group_of]], minlength=len(kind_of)
    )
    used = np.bincount(group_of, minlength=len(kind_of)) > 0
    loads = np.where(used, sums + problem.fixed[kind_of], 0.0)
    return Assignment(tuple(int(count) for count in counts), kind_of, group_of, loads)
