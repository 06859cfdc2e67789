"""The processes of an evaluation: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Ranks:
    """This process among `size`. Every rank asks its part of the samples; all get all results."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, count: int) -> range:
        """The samples of `count` that this rank asks."""
        return range(self.rank, count, self.size)

    def gather(self, found: Iterable[Any]) -> list[Any]:
        """All ranks' items, this rank's among them, by rank. Collective."""
        own = list(found)
        if self.size == 1:
            return own
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, own)
        return [item for part in parts for item in part]


def world() -> Ranks:
    """The place that torchrun's environment gives this process, before any group exists."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


@contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """A process group over the ranks, left at the end; nothing for one rank or where there is a group."""
    if ranks.size == 1 or dist.is_initialized():
        yield
        return
    from ltrain.parallel.mesh import init_process_group

    init_process_group(TIMEOUT_S)
    try:
        yield
    finally:
        dist.destroy_process_group()
