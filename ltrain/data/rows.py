"""A packed row, and what the model is given of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

IGNORE = -100
PADDING = -1


class Piece(NamedTuple):
    """`length` tokens of a source's document, from token `start` on."""

    source: int
    document: int
    start: int
    length: int


@dataclass(frozen=True)
class Row:
    """Tokens int32 [T] of documents that lie one after the other; the rest after the last one is padding.

    With `document_mask=False` the row counts as one document for positions and attention; targets still end
    where a document ends. `targets=False` makes every target ignored. `pieces` says where the
    tokens are from.
    """

    tokens: np.ndarray
    document_lengths: tuple[int, ...]
    document_mask: bool = True
    targets: bool = True
    pieces: tuple[Piece, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.document_lengths)

    def without_targets(self) -> Row:
        return replace(self, targets=False)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, labels (the next token of the same document, else -100), positions and document ids, all
        int32 [T].

        Positions start at 0 in every document, and in the padding; padding has document -1.
        """
        size, used = len(self.tokens), self.num_tokens
        lengths = np.asarray(self.document_lengths, dtype=np.int64)
        ends = np.cumsum(lengths)
        labels = np.full(size, IGNORE, dtype=np.int32)
        if self.targets and used:
            labels[: used - 1] = self.tokens[1:used]
            labels[ends - 1] = IGNORE
        doc_ids = np.full(size, PADDING, dtype=np.int32)
        positions = np.arange(size, dtype=np.int32)
        if self.document_mask:
            doc_ids[:used] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
            positions[:used] -= np.repeat(ends - lengths, lengths).astype(np.int32)
            positions[used:] -= used
        else:
            doc_ids[:used] = 0
        return self.tokens, labels, positions, doc_ids
