"""How many blocks of each part of a sequence a sparse layer keeps: pure arithmetic on block numbers.

The blocks of a document fall into `strata` strata by a rule that the configuration fixes and that no world
size enters. Every stratum of a document keeps the same number of blocks, so each rank of a context-parallel
group, which holds whole strata, keeps as much as any other, and the choice is the same for every number of
ranks (docs/design/elimination.md).

N blocks of a sequence, in document order. A *cell* is the part of a document that lies in one stratum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from ltrain.config.base import ConfigError

Deal = Literal["striped", "contiguous"]

# A ratio such as 0.3 times a count must not lose a block to rounding.
_EPSILON = 1e-9


def stratum_of_block(num_blocks: int, strata: int, deal: Deal = "striped", per_deal: int = 1) -> np.ndarray:
    """The stratum of every block, int64 [N]; `per_deal` consecutive blocks are dealt together.

    `striped`: deal d is of stratum d mod strata, for layouts that deal blocks round robin. `contiguous`: runs
    of deals, for contiguous and zigzag layouts.
    """
    deals = np.arange(num_blocks, dtype=np.int64) // per_deal
    if deal == "striped":
        return deals % strata
    return deals * strata // max(-(-num_blocks // per_deal), 1)


@dataclass(frozen=True, eq=False)
class Quotas:
    """What to keep of a sequence of N blocks, whatever the scores.

    `cell` int64 [N] is the cell of each block, -1 for blocks that are never kept (padding); `forced` bool [N]
    marks blocks that are always kept; `quota` int64 [cells] counts the blocks that a cell keeps, the forced
    ones among them.
    """

    cell: np.ndarray
    forced: np.ndarray
    quota: np.ndarray

    @cached_property
    def num_kept(self) -> int:
        return int(self.quota.sum())

    @property
    def num_blocks(self) -> int:
        return len(self.cell)


def plan_quotas(
    num_blocks: int,
    ratio: float,
    *,
    strata: int = 1,
    deal: Deal = "striped",
    per_deal: int = 1,
    forced: np.ndarray | None = None,
    doc_of_block: np.ndarray | None = None,
) -> Quotas:
    """The quotas of a sequence.

    A document of n blocks keeps floor(ratio x n / strata) of them in every stratum, so that strata stay
    equal. One too short for that is not divided and keeps floor(ratio x n), at least one, of all its blocks
    (with contiguous strata it is divided where a border of strata cuts it). Forced blocks count; where a
    stratum holds more of them than its quota, all strata of the document keep that many. A ratio of 1 keeps
    everything but padding.

    forced: bool [N]. doc_of_block: int [N], -1 for padding, which is never kept. Raises ConfigError on a
    ratio outside (0, 1] and on strata below one.
    """
    check_ratio("ratio", ratio)
    if strata < 1:
        raise ConfigError("strata", strata, "must be at least 1")
    forced = np.zeros(num_blocks, bool) if forced is None else np.asarray(forced, bool).copy()
    docs = np.zeros(num_blocks, np.int64) if doc_of_block is None else np.asarray(doc_of_block, np.int64)
    for name, x in (("forced", forced), ("doc_of_block", docs)):
        if x.shape != (num_blocks,):
            raise ConfigError(f"{name}.shape", x.shape, f"must be [{num_blocks}], one entry a block")
    forced &= docs >= 0
    stratum = stratum_of_block(num_blocks, strata, deal, per_deal)
    cell = np.full(num_blocks, -1, np.int64)
    quota: list[int] = []
    real = docs[docs >= 0]
    # np.unique sorts; documents are taken in the order of their numbers.
    for doc in np.unique(real):
        own = np.flatnonzero(docs == doc)
        parts = stratum[own]
        if deal == "striped" and int(ratio * len(own) / strata + _EPSILON) < 1:
            parts = np.zeros(len(own), np.int64)
        names, inside, sizes = np.unique(parts, return_inverse=True, return_counts=True)
        counts = _cell_quotas(ratio, sizes, strata, per_deal)
        held = np.bincount(inside, weights=forced[own], minlength=len(names)).astype(np.int64)
        if len(names) == strata:
            counts = np.maximum(counts, held.max())
        counts = np.minimum(np.maximum(counts, held), sizes)
        cell[own] = len(quota) + inside
        quota += counts.tolist()
    return Quotas(cell, forced, np.asarray(quota, np.int64))


def _cell_quotas(ratio: float, sizes: np.ndarray, strata: int, per_deal: int) -> np.ndarray:
    """Blocks to keep in the cells of one document, before forced ones are counted."""
    if ratio == 1:
        return sizes.copy()
    total = int(sizes.sum())
    if len(sizes) == strata and sizes.max() - sizes.min() <= per_deal:
        return np.full(len(sizes), max(1, int(ratio * total / strata + _EPSILON)), np.int64)
    counts = (ratio * sizes + _EPSILON).astype(np.int64)
    if not counts.any():
        counts[np.argmax(sizes)] = 1
    return counts


def check_ratio(field: str, ratio: float) -> None:
    """Raise ConfigError unless 0 < ratio <= 1."""
    if not 0 < ratio <= 1:
        raise ConfigError(field, ratio, "must lie in (0, 1]", "1 keeps every token")
