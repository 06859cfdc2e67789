"""How much attention a document needs, in squared tokens of dense causal attention.

A work model is any callable from lengths (float64 [S]) to work (float64 [S], positive, not falling with
length), where dense causal attention over s tokens counts as s^2. The classes below are the usual ones; they
are values that pickle, so that a planning process can receive them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ltrain.config.base import ConfigError


class Work(Protocol):
    def __call__(self, lengths: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class DenseWork:
    """Every causal pair: s^2."""

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        return lengths * lengths


@dataclass(frozen=True)
class WindowWork:
    """The last `window` keys of each query: 2 s w - w^2 beyond the window, exact."""

    window: int

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        inside = np.minimum(lengths, self.window)
        return 2.0 * lengths * inside - inside * inside


@dataclass(frozen=True)
class DensityWork:
    """A share `density` of the causal pairs, plus a selection that costs `selection` of the dense work, and
    at least the `floor_tokens` nearest keys of every query (sinks and local blocks)."""

    density: float
    selection: float = 0.0
    floor_tokens: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ConfigError("cost.work.density", self.density, "must be in (0, 1]")
        if self.selection < 0 or self.floor_tokens < 0:
            raise ConfigError("cost.work", self, "must not be negative")

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        dense = lengths * lengths
        kept = np.maximum(self.density * dense, WindowWork(self.floor_tokens)(lengths))
        return kept + self.selection * dense


@dataclass(frozen=True)
class MixedWork:
    """Layers of several kinds: the weighted sum of their works; weights are shares of the layers."""

    parts: tuple[tuple[float, Work], ...]

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        return np.sum([weight * work(lengths) for weight, work in self.parts], axis=0)


@dataclass(frozen=True)
class TableWork:
    """Measured work at given lengths, interpolated in logarithms, continued with the last slope."""

    lengths: tuple[int, ...]
    work: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.lengths) < 2 or len(self.lengths) != len(self.work):
            raise ConfigError(
                "cost.work.table", len(self.lengths), "must hold two or more (length, work) pairs"
            )
        if not _rising(self.lengths) or not _rising(self.work):
            raise ConfigError("cost.work.table", self.lengths, "must hold positive, rising lengths and work")

    def __call__(self, lengths: np.ndarray) -> np.ndarray:
        x, y = np.log(self.lengths), np.log(self.work)
        at = np.log(np.maximum(lengths, 1.0))
        index = np.clip(np.searchsorted(x, at) - 1, 0, len(x) - 2)
        slope = (y[index + 1] - y[index]) / (x[index + 1] - x[index])
        return np.exp(y[index] + slope * (at - x[index]))


def _rising(values: Sequence[float]) -> bool:
    array = np.asarray(values, dtype=np.float64)
    return bool(array[0] > 0 and np.all(np.diff(array) > 0))
