"""What a selection asks of the other ranks, as data, and how a single process answers.

A dynamic pattern's search is a generator: it computes on its own shard, yields a request, goes on with the
answer, and returns. The same generator runs on one process (`run_alone`) and on a group
(`ltrain.attention.select`), so both find the same index, and the number of requests is the number of
collectives.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Gather:
    """All ranks get all rows: row i of the answer [len(owner), ...] is the next unsent row of rank owner[i].

    `rows` [number of own rows, ...]; `owner` int [rows of the answer], equal on all ranks.
    """

    rows: Tensor
    owner: np.ndarray


@dataclass(frozen=True)
class Deal:
    """Items change hands: the answer [own items, len(owner), ...] holds all rows of the items dealt to this
    rank.

    `rows` [items, number of own rows, ...]; `owner` as in `Gather`; `dealt` int [items] is the rank of each
    item.
    """

    rows: Tensor
    owner: np.ndarray
    dealt: np.ndarray


Request = Gather | Deal
Steps = Generator[Request, Tensor, Any]


@dataclass(frozen=True)
class Place:
    """Which blocks of the sequence this rank holds, and who holds the others."""

    rank: int
    world_size: int
    block_owner: np.ndarray
    block: int

    @property
    def blocks(self) -> np.ndarray:
        """Ids of this rank's blocks, ascending."""
        return np.flatnonzero(self.block_owner == self.rank)

    def dealt(self, num_items: int) -> np.ndarray:
        """The rank that finishes each of `num_items` items (heads), as even as can be, int64 [num_items]."""
        return np.arange(num_items) * self.world_size // max(num_items, 1)

    def owner_of_tokens(self, token_ids: np.ndarray) -> np.ndarray:
        """The rank of every token, int64."""
        return self.block_owner[token_ids // self.block]


def alone(num_tokens: int, block: int) -> Place:
    """The place of a process that holds the whole sequence."""
    return Place(0, 1, np.zeros(-(-num_tokens // block), np.int64), block)


def run_alone(steps: Steps) -> Any:
    """Drive a search on one process, where every answer is the request's own rows."""
    try:
        request = next(steps)
        while True:
            request = steps.send(request.rows)
    except StopIteration as stop:
        return stop.value
