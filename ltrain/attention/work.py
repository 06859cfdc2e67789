"""How much attention work an index makes, for whom: the numbers behind balance, cost model and simulator.

Pure planning: nothing here communicates or attends. A tile is one selected block of one query head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltrain.parallel.layout import SequenceLayout
from ltrain_kernels.block_sparse import BlockIndex


@dataclass(frozen=True)
class Entries:
    """The selected blocks that hold a visible pair: row and column of each, and its query head's share of
    work.

    weight: query heads that one entry stands for (the index may be shared by several).
    """

    row: np.ndarray
    col: np.ndarray
    head: np.ndarray
    num_heads: int
    weight: int


def visible_entries(
    index: BlockIndex, layout: SequenceLayout, num_q_heads: int, doc_ids: Tensor | None = None
) -> Entries:
    """The entries of a whole-sequence index that are worked on: causal and, with documents, of a common
    document.

    An index of several batches counts its first.
    """
    ptr, col_t = index.entries()
    counts = (ptr[0, :, 1:] - ptr[0, :, :-1]).cpu().numpy()
    col = col_t[: int(counts.sum())].cpu().numpy()
    rows = index.num_rows
    # int32 keeps a dense mask of a million tokens at some hundreds of megabytes.
    line = np.repeat(np.arange(index.heads * rows, dtype=np.int32), counts.reshape(-1))
    head, row = line // max(rows, 1), line % max(rows, 1)
    kept = col <= row
    if doc_ids is not None:
        low, high = block_documents(doc_ids.reshape(-1, layout.num_tokens)[0], layout)
        kept &= (low[col] <= high[row]) & (high[col] >= low[row])
    return Entries(row[kept], col[kept], head[kept], index.heads, num_q_heads // max(index.heads, 1))


def block_documents(doc_ids: Tensor, layout: SequenceLayout) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest document id in every block."""
    doc = doc_ids.cpu().to(torch.int64).numpy()
    pad = layout.num_blocks * layout.block - layout.num_tokens
    doc = np.concatenate([doc, np.repeat(doc[-1:], pad)]).reshape(layout.num_blocks, layout.block)
    return doc.min(1), doc.max(1)


@dataclass(frozen=True)
class Work:
    """Tiles of every pair of ranks, [ranks, ranks]: queries of the first against keys of the second; and by
    head.

    `lengths` are the shard lengths in tokens.
    """

    tiles: np.ndarray
    by_head: np.ndarray
    lengths: tuple[int, ...]
    block: int

    @classmethod
    def of(cls, entries: Entries, layout: SequenceLayout, num_q_heads: int) -> Work:
        ranks, owner = layout.world_size, layout.block_owner
        pairs = np.bincount(owner[entries.row] * ranks + owner[entries.col], minlength=ranks * ranks)
        heads = np.bincount(entries.head, minlength=entries.num_heads).astype(float)
        by_head = np.repeat(heads, num_q_heads // max(len(heads), 1))
        return cls(pairs.reshape(ranks, ranks) * float(entries.weight), by_head, layout.lengths, layout.block)

    @property
    def ranks(self) -> int:
        return len(self.tiles)

    @property
    def imbalance(self) -> float:
        """Largest over mean work of a rank; 1 is even."""
        total = self.tiles.sum(1)
        return float(total.max() / total.mean()) if total.sum() else 1.0

    @property
    def step_imbalance(self) -> float:
        """Time of a ring whose ranks wait for the slowest at every step, over that of perfectly divided
        work."""
        rank = np.arange(self.ranks)
        steps = [self.tiles[rank, (rank - t) % self.ranks].max() for t in range(self.ranks)]
        return float(sum(steps) / (self.tiles.sum() / self.ranks)) if self.tiles.sum() else 1.0

    def grouped(self, size: int) -> np.ndarray:
        """Tiles of each rank against each run of `size` ranks, [ranks, ranks / size]."""
        return self.tiles.reshape(self.ranks, self.ranks // size, size).sum(2)


def rank_imbalance(row_work: np.ndarray, layout: SequenceLayout) -> float:
    """Largest over mean work of a rank, from the work of every row of blocks; 1 is even."""
    by_rank = np.bincount(layout.block_owner, weights=row_work, minlength=layout.world_size)
    return float(by_rank.max() / by_rank.mean()) if by_rank.sum() else 1.0


def deal_blocks(row_work: np.ndarray, layout: SequenceLayout) -> SequenceLayout:
    """The blocks of `layout` dealt anew, heaviest row first, each to the least loaded rank that has room.

    Every rank gets the same number of blocks, to within one, so that memory and the rest of the model stay
    even.
    """
    ranks = layout.world_size
    each, spare = divmod(layout.num_blocks, ranks)
    count, load = np.zeros(ranks, int), np.zeros(ranks)
    owner = np.zeros(layout.num_blocks, int)
    for block in np.argsort(-row_work, kind="stable"):
        best = int(np.argmin(np.where(count < each + (spare > 0), load, np.inf)))
        owner[block] = best
        load[best] += row_work[block]
        count[best] += 1
        spare -= count[best] > each
    return SequenceLayout.dealt(owner.tolist(), layout.num_tokens, ranks, layout.block)


def balanced_layout(
    index: BlockIndex,
    layout: SequenceLayout,
    num_q_heads: int,
    doc_ids: Tensor | None = None,
    tolerance: float = 1.05,
) -> tuple[SequenceLayout, Work]:
    """`layout`, or where its busiest rank has over `tolerance` times the mean work, its blocks dealt longest
    first.

    The deal is taken only where it is the more even of the two. Returns the layout and its work.
    """
    entries = visible_entries(index, layout, num_q_heads, doc_ids)
    work = Work.of(entries, layout, num_q_heads)
    if work.imbalance <= tolerance:
        return layout, work
    dealt = deal_blocks(np.bincount(entries.row, minlength=layout.num_blocks), layout)
    other = Work.of(entries, dealt, num_q_heads)
    return (dealt, other) if other.imbalance < work.imbalance else (layout, work)
