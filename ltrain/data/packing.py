"""Documents to rows of a fixed length. Packing moves references; no token is read for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ltrain.data.rows import Piece

Pieces = tuple[Piece, ...]


def split_document(piece: Piece, longest: int, how: str) -> tuple[list[Piece], int]:
    """Pieces of at most `longest` tokens, and how many tokens were dropped. `how` is "split" or "drop"."""
    if piece.length <= longest:
        return [piece], 0
    if how == "drop":
        return [], piece.length
    starts = range(0, piece.length, longest)
    return [_part(piece, at, min(longest, piece.length - at)) for at in starts], 0


def _part(piece: Piece, at: int, length: int) -> Piece:
    return piece._replace(start=piece.start + at, length=length)


class Packer:
    """Fills rows of `length` tokens. `push` takes a piece, not longer than a row, and returns the rows that
    are complete with it.

    `first_fit` puts a document whole into the first open row with room and closes the fullest row when more
    than `open_rows` are open. `concat_split` is one stream that is cut at the end of every row. `none` makes
    every document a row of its own length.
    """

    def __init__(self, kind: str, length: int, open_rows: int = 32) -> None:
        self.kind, self.length, self.open_rows = kind, length, open_rows
        self._open: list[list[Piece]] = []
        self._used: list[int] = []

    def push(self, piece: Piece) -> list[Pieces]:
        if self.kind == "none":
            return [(piece,)]
        if self.kind == "concat_split":
            return list(self._stream(piece))
        return self._first_fit(piece)

    def _stream(self, piece: Piece) -> Iterator[Pieces]:
        while piece.length:
            taken = min(piece.length, self.length - (self._used[0] if self._used else 0))
            self._add(0, _part(piece, 0, taken))
            piece = _part(piece, taken, piece.length - taken)
            if self._used[0] == self.length:
                yield self._close(0)

    def _first_fit(self, piece: Piece) -> list[Pieces]:
        at = next((i for i, u in enumerate(self._used) if u + piece.length <= self.length), len(self._open))
        self._add(at, piece)
        if self._used[at] == self.length:
            return [self._close(at)]
        if len(self._open) > self.open_rows:
            return [self._close(self._used.index(max(self._used)))]
        return []

    def _add(self, at: int, piece: Piece) -> None:
        if at == len(self._open):
            self._open.append([])
            self._used.append(0)
        self._open[at].append(piece)
        self._used[at] += piece.length

    def _close(self, at: int) -> Pieces:
        self._used.pop(at)
        return tuple(self._open.pop(at))

    def flush(self) -> list[Pieces]:
        """Close all open rows, full or not."""
        return [self._close(0) for _ in range(len(self._open))]

    def state_dict(self) -> Any:
        return [[list(piece) for piece in row] for row in self._open]

    def load_state_dict(self, state: Any) -> None:
        self._open = [[Piece(*piece) for piece in row] for row in state]
        self._used = [sum(piece.length for piece in row) for row in self._open]
