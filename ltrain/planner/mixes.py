"""Document lengths of three public corpora, as histograms to draw batches from.

`wikipedia` is counted from a million tokenised articles. For `github` and `commoncrawl` no lengths were
published; their histograms are of a lognormal body with a Pareto tail beyond 16K tokens, fitted to published
step times and shares (arXiv 2412.01523, section 6). Documents beyond the cap are dropped, as there.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from ltrain.config.base import ConfigError

_EDGES = (16, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 196608, 262144, 393216)
_TAIL_START, _TAIL_INDEX = 16384, 1.1


@dataclass(frozen=True)
class LengthMix:
    """Shares of documents by length: `shares[i]` lie in (edges[i], edges[i+1]], spread evenly in the
    logarithm."""

    name: str
    edges: tuple[int, ...]
    shares: tuple[float, ...]

    def draw(self, count: int, cap: int, seed: int) -> list[int]:
        """`count` lengths of at most `cap` tokens; equal arguments give equal lengths. Raises ConfigError on
        a cap below the shortest document."""
        if cap <= self.edges[0]:
            raise ConfigError("mix.cap", cap, f"must exceed the shortest document, {self.edges[0]} tokens")
        if count < 1:
            raise ConfigError("mix.count", count, "must be at least 1")
        rng = np.random.default_rng(seed)
        kept: list[int] = []
        shares = np.asarray(self.shares) / sum(self.shares)
        logs = np.log(self.edges)
        while len(kept) < count:
            bins = rng.choice(len(shares), size=2 * count, p=shares)
            drawn = np.exp(logs[bins] + rng.random(2 * count) * (logs[bins + 1] - logs[bins]))
            kept += [int(length) for length in np.ceil(drawn) if length <= cap]
        return kept[:count]


def _body_and_tail(median: float, sigma: float, tail: float) -> tuple[float, ...]:
    """Bin shares of a lognormal body and a Pareto tail of weight `tail`."""

    def below(x: float) -> float:
        body = 0.5 * (1 + math.erf((math.log(x) - math.log(median)) / (sigma * math.sqrt(2))))
        pareto = 0.0 if x <= _TAIL_START else 1 - (_TAIL_START / x) ** _TAIL_INDEX
        return (1 - tail) * body + tail * pareto

    cumulative = [0.0, *(below(edge) for edge in _EDGES[1:])]
    return tuple(b - a for a, b in itertools.pairwise(cumulative))


_WIKIPEDIA = (
    21.445,
    20.205,
    21.036,
    16.123,
    10.838,
    5.958,
    2.796,
    1.122,
    0.3465,
    0.1027,
    0.0228,
    0.0030,
    0.0012,
    0.0005,
)

MIXES = {
    mix.name: mix
    for mix in (
        LengthMix("wikipedia", _EDGES, _WIKIPEDIA),
        LengthMix("commoncrawl", _EDGES, _body_and_tail(900, 1.30, 0.025)),
        LengthMix("github", _EDGES, _body_and_tail(1000, 1.35, 0.032)),
    )
}


def mix(name: str) -> LengthMix:
    """A built-in mix by name. Raises ConfigError on an unknown one."""
    if name not in MIXES:
        raise ConfigError("mix", name, f"must be one of {', '.join(MIXES)}")
    return MIXES[name]
