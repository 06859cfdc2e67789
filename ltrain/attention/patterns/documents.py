"""Where documents begin and end, in tokens and in blocks: all that a pattern needs to know of a packed
sequence.

N blocks of `block` tokens, document order. Documents are contiguous, so a block is related to *earlier*
blocks only through the document of its first token, and to *later* blocks only through the document of its
last token. Hence every cross-block statistic of a block is taken over the tokens of that one document, and
needs no mask over pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ltrain.config.base import ConfigError
from ltrain_kernels.block_sparse import BlockIndex


@dataclass(frozen=True)
class Documents:
    """One sequence of `num_tokens` tokens whose documents start at `starts` (ascending, the first is 0)."""

    num_tokens: int
    block: int
    starts: np.ndarray

    @cached_property
    def ends(self) -> np.ndarray:
        """One past the last token of every document."""
        return np.append(self.starts[1:], self.num_tokens).astype(np.int64)

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block)

    @property
    def packed(self) -> bool:
        """Whether there is more than one document."""
        return len(self.starts) > 1

    @cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        first = np.arange(self.num_blocks, dtype=np.int64) * self.block
        return first, np.minimum(first + self.block, self.num_tokens)

    @cached_property
    def of_first(self) -> np.ndarray:
        """Number of the document of every block's first token, int64 [N]."""
        return np.searchsorted(self.starts, self._edges[0], side="right") - 1

    @cached_property
    def of_last(self) -> np.ndarray:
        """Number of the document of every block's last token, int64 [N]."""
        return np.searchsorted(self.starts, self._edges[1] - 1, side="right") - 1

    @cached_property
    def first_block(self) -> np.ndarray:
        """The block that holds a document's first token, int64 [documents]."""
        return self.starts // self.block

    @cached_property
    def last_block(self) -> np.ndarray:
        """The block that holds a document's last token, int64 [documents]."""
        return (self.ends - 1) // self.block

    @cached_property
    def low(self) -> np.ndarray:
        """The earliest block that any query of a row can see: its first token's document begins there."""
        return self.first_block[self.of_first]

    @cached_property
    def query_run(self) -> tuple[np.ndarray, np.ndarray]:
        """Token range (from, to) inside every block of its first document: the queries that see earlier
        blocks.
        """
        first, end = self._edges
        return first, np.minimum(end, self.ends[self.of_first])

    @cached_property
    def key_run(self) -> tuple[np.ndarray, np.ndarray]:
        """Token range (from, to) inside every block of its last document: the keys that later blocks see."""
        first, end = self._edges
        return np.maximum(first, self.starts[self.of_last]), end

    def pairs(self, row: np.ndarray, col: np.ndarray) -> np.ndarray:
        """Visible (query, key) pairs of each block pair (row, col), causal and inside documents, int64."""
        queries = self.query_run[1] - self.query_run[0]
        keys = self.key_run[1] - self.key_run[0]
        earlier = np.where(self.of_first[row] == self.of_last[col], queries[row] * keys[col], 0)
        return np.where(col < row, earlier, np.where(col == row, self._diagonal_pairs[row], 0))

    @cached_property
    def _diagonal_pairs(self) -> np.ndarray:
        # Every document contributes one piece to each block that it touches.
        cuts = np.union1d(np.union1d(self.starts, self._edges[0]), [self.num_tokens]).astype(np.int64)
        length = np.diff(cuts)
        return np.bincount(
            cuts[:-1] // self.block, weights=length * (length + 1) // 2, minlength=self.num_blocks
        ).astype(np.int64)

    @cached_property
    def total_pairs(self) -> int:
        """Visible pairs of dense causal attention inside documents."""
        length = self.ends - self.starts
        return int((length * (length + 1) // 2).sum())


def documents_of(doc_ids: Tensor | None, num_tokens: int, block: int) -> list[Documents]:
    """The documents of each sequence of a batch; one entry for all where `doc_ids` is None or [T].

    doc_ids: integer [T] or [B, T], document order, equal inside a document. Raises ConfigError on another
    shape or dtype, and where a document's tokens are not contiguous.
    """
    if block < 1 or num_tokens < 0:
        raise ConfigError(
            "num_tokens, block", (num_tokens, block), "must not be negative, and block at least 1"
        )
    if doc_ids is None:
        return [Documents(num_tokens, block, np.zeros(1, np.int64))]
    if doc_ids.dim() not in (1, 2) or doc_ids.shape[-1] != num_tokens:
        raise ConfigError(
            "doc_ids.shape",
            tuple(doc_ids.shape),
            f"must be [T] or [B, T] with T = {num_tokens}",
            "pass the whole sequence",
        )
    if doc_ids.is_floating_point() or doc_ids.dtype == torch.bool:
        raise ConfigError("doc_ids.dtype", doc_ids.dtype, "must be an integer type")
    rows = doc_ids.detach().cpu().numpy().reshape(-1, num_tokens)
    return [_one(row, num_tokens, block) for row in rows]


def _one(ids: np.ndarray, num_tokens: int, block: int) -> Documents:
    starts = np.append(0, np.flatnonzero(np.diff(ids)) + 1).astype(np.int64)
    if num_tokens and len(np.unique(ids[starts])) != len(starts):
        values, counts = np.unique(ids[starts], return_counts=True)
        raise ConfigError(
            "doc_ids",
            int(values[counts > 1][0]),
            "names a document whose tokens are not contiguous",
            "number runs apart",
        )
    return Documents(num_tokens, block, starts)


def density(index: BlockIndex, documents: list[Documents]) -> float:
    """Share of the visible (query, key) pairs of dense causal attention that `index` keeps, over batch and
    heads.
    """
    ptr, col = index.entries()
    col_np = col.cpu().numpy().astype(np.int64)
    lists = (ptr[..., 1:] - ptr[..., :-1]).reshape(index.batch, -1).cpu().numpy()
    ptr_np = ptr.reshape(index.batch, -1).cpu().numpy()
    kept = total = 0
    for b in range(max(index.batch, len(documents))):
        docs, i = documents[b if len(documents) > 1 else 0], b if index.batch > 1 else 0
        row = np.repeat(np.tile(np.arange(index.num_rows), index.heads), lists[i])
        kept += int(docs.pairs(row, col_np[ptr_np[i, 0] : ptr_np[i, -1]]).sum())
        total += docs.total_pairs * index.heads
    return kept / total if total else 1.0
