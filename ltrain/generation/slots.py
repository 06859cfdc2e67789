"""Which blocks of keys a sequence's cache holds, and where: bookkeeping without any tensor of keys.

Hg key/value heads of a group, S slots, `block` tokens a slot. Layers whose rule is the same share one table,
since they keep the same blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Columns = list[np.ndarray]

# Heads whose lists differ by at most one block at this row are stored together.
PROBE_ROW = 4096


def head_groups(columns: Columns) -> list[np.ndarray]:
    """Key/value heads in groups of like size: `columns` are the blocks each keeps at a row far out."""
    groups: list[list[int]] = []
    for head in sorted(range(len(columns)), key=lambda h: (len(columns[h]), h)):
        if groups and len(columns[head]) - len(columns[groups[-1][0]]) <= 1:
            groups[-1].append(head)
        else:
            groups.append([head])
    return [np.array(sorted(group)) for group in groups]


@dataclass(frozen=True)
class Write:
    """Where new tokens go: token i of head h into slot `slots[g][h, i]`, place `places[i]` of the slot."""

    slots: tuple[np.ndarray, ...]
    places: np.ndarray


class SlotTable:
    """For every head of every group the block that each slot holds (-1: none), over `length` tokens.

    Slots of blocks that no later query sees are given to new blocks, so a window is a ring.
    """

    def __init__(self, groups: Sequence[np.ndarray], block: int) -> None:
        self.groups = tuple(groups)
        self.block = block
        self.length = 0
        self.cols = [np.full((len(group), 0), -1, np.int64) for group in self.groups]

    def copy(self) -> SlotTable:
        made = SlotTable(self.groups, self.block)
        made.length = self.length
        made.cols = [cols.copy() for cols in self.cols]
        return made

    @property
    def nbytes(self) -> int:
        return sum(cols.nbytes for cols in self.cols)

    def load(self, length: int, kept: Columns | None) -> None:
        """Take up the first `length` tokens, of which each head keeps its blocks `kept` (None: all)."""
        assert self.length == 0
        num_blocks = -(-length // self.block)
        everything = np.arange(num_blocks)
        for g, group in enumerate(self.groups):
            lists = [everything if kept is None else kept[head][kept[head] < num_blocks] for head in group]
            self.cols[g] = np.full((len(group), max(map(len, lists))), -1, np.int64)
            for row, blocks in zip(self.cols[g], lists, strict=True):
                row[: len(blocks)] = blocks
        self.length = length

    def extend(self, count: int) -> Write:
        """Make room for `count` more tokens and say where they go."""
        position = np.arange(self.length, self.length + count)
        own = position // self.block
        new = range(-(-self.length // self.block), int(own[-1]) + 1)
        for g in range(len(self.groups)):
            for column in new:
                self._place(g, column)
        slots = tuple(
            np.stack([np.argmax(row[None] == own[:, None], axis=1) for row in cols]) for cols in self.cols
        )
        self.length += count
        return Write(slots, position % self.block)

    def _place(self, g: int, column: int) -> None:
        if not (self.cols[g] < 0).any(axis=1).all():
            self.cols[g] = np.pad(self.cols[g], ((0, 0), (0, 1)), constant_values=-1)
        for row in self.cols[g]:
            row[np.argmax(row < 0)] = column

    def evict(self, kept: Columns | None) -> None:
        """Free the slots of blocks that are not in `kept`."""
        if kept is None:
            return
        for group, cols in zip(self.groups, self.cols, strict=True):
            for head, row in zip(group, cols, strict=True):
                row[~np.isin(row, kept[head])] = -1
