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

    def parts(self) -> list[Row]:
        """The pieces of the row that see nothing of each other, without padding: its documents, or, without a
        document mask, the row itself. Targets, positions and visibility of a part are those it has here.
        """
        if not self.num_tokens:
            return []
        if not self.document_mask:
            return [replace(self, tokens=self.tokens[: self.num_tokens])]
        ends = np.cumsum(self.document_lengths)
        pieces = [(piece,) for piece in self.pieces] or [()] * len(ends)
        return [
            replace(self, tokens=self.tokens[end - n : end], document_lengths=(n,), pieces=own)
            for end, n, own in zip(ends, self.document_lengths, pieces, strict=True)
            if n
        ]

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


@dataclass(frozen=True)
class Stream:
    """Parts of rows one after the other, none of which sees another, and padding up to `num_tokens`."""

    parts: tuple[Row, ...]
    num_tokens: int

    @property
    def document_lengths(self) -> tuple[int, ...]:
        return tuple(n for part in self.parts for n in part.document_lengths)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `Row.arrays`; document ids number the parts."""
        tokens = np.zeros(self.num_tokens, dtype=np.int32)
        labels = np.full(self.num_tokens, IGNORE, dtype=np.int32)
        positions = np.zeros(self.num_tokens, dtype=np.int32)
        doc_ids = np.full(self.num_tokens, PADDING, dtype=np.int32)
        at = 0
        for number, part in enumerate(self.parts):
            here = slice(at, at + part.num_tokens)
            tokens[here], labels[here], positions[here], _ = part.arrays()
            doc_ids[here] = number
            at = here.stop
        positions[at:] = np.arange(self.num_tokens - at)
        return tokens, labels, positions, doc_ids
