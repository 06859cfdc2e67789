"""Documents to rows of a fixed length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ltrain.data.rows import Row


def split_document(tokens: np.ndarray, longest: int, how: str) -> tuple[list[np.ndarray], int]:
    """Pieces of at most `longest` tokens, and how many tokens were dropped."""
    if len(tokens) <= longest:
        return [tokens], 0
    if how == "drop":
        return [], len(tokens)
    return [tokens[i : i + longest] for i in range(0, len(tokens), longest)], 0


class Packer:
    """Fills rows of `length` tokens. `push` takes a document and returns the rows that are full with it.

    `first_fit` puts a document whole into the first open row with room and closes the fullest row when more
    than `open_rows` are open. `concat_split` is one stream that is cut at the end of every row. `none` makes
    every document a row of its own length.
    """

    def __init__(self, kind: str, length: int, document_mask: bool, open_rows: int = 32) -> None:
        self.kind, self.length, self.document_mask, self.open_rows = kind, length, document_mask, open_rows
        self._open: list[list[np.ndarray]] = []

    def push(self, tokens: np.ndarray) -> list[Row]:
        if self.kind == "none":
            return [Row(tokens, (len(tokens),), self.document_mask)]
        if self.kind == "concat_split":
            return list(self._stream(tokens))
        return self._first_fit(tokens)

    def _stream(self, tokens: np.ndarray) -> Iterator[Row]:
        while len(tokens):
            if not self._open:
                self._open.append([])
            room = self.length - sum(map(len, self._open[0]))
            self._open[0].append(tokens[:room])
            tokens = tokens[room:]
            if sum(map(len, self._open[0])) == self.length:
                yield self._row(self._open.pop(0))

    def _first_fit(self, tokens: np.ndarray) -> list[Row]:
        full = []
        for documents in self._open:
            if sum(map(len, documents)) + len(tokens) <= self.length:
                documents.append(tokens)
                break
        else:
            self._open.append([tokens])
        done = [d for d in self._open if sum(map(len, d)) == self.length]
        if not done and len(self._open) > self.open_rows:
            done = [max(self._open, key=lambda d: sum(map(len, d)))]
        for documents in done:
            self._open = [d for d in self._open if d is not documents]
            full.append(self._row(documents))
        return full

    def flush(self) -> list[Row]:
        """Close all open rows, full or not."""
        rows, self._open = [self._row(documents) for documents in self._open], []
        return rows

    def _row(self, documents: list[np.ndarray]) -> Row:
        tokens = np.zeros(self.length, dtype=np.int32)
        joined = np.concatenate(documents)
        tokens[: len(joined)] = joined
        return Row(tokens, tuple(map(len, documents)), self.document_mask)

    def state_dict(self) -> Any:
        return [[d.tolist() for d in documents] for documents in self._open]

    def load_state_dict(self, state: Any) -> None:
        self._open = [[np.asarray(d, dtype=np.int32) for d in documents] for documents in state]
