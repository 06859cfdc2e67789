"""Which rank of a context-parallel group holds which tokens.

A layout is pure arithmetic on token ids in document order; it never communicates. The loader applies it once
to tokens, labels, positions and document ids, and the model then lives in that order end to end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ltrain.config.base import ConfigError

LayoutKind = Literal["striped", "zigzag", "contiguous", "dealt"]


@dataclass(frozen=True)
class SequenceLayout:
    """Deals `num_tokens` tokens to `world_size` ranks in blocks of `block` tokens.

    - `striped`: block i goes to rank i mod world_size. A causal, sliding or block-Toeplitz mask is then even
      over ranks and over ring steps (arXiv 2510.18830, section 3).
    - `zigzag`: 2 x world_size chunks, rank r holds chunks r and 2 x world_size - 1 - r.
    - `contiguous`: rank r holds the r-th run of blocks.
    - `dealt`: an explicit owner for every block (`SequenceLayout.dealt`), for masks that no regular deal
      balances and for groups whose members are not equally fast.

    Any number of tokens and ranks is allowed: shards differ in length, the last block may be short, a rank
    may hold nothing. Tokens keep their document order inside a shard.

    Raises ConfigError on a negative token count, or on a rank count or block below one.
    """

    kind: LayoutKind
    num_tokens: int
    world_size: int
    block: int = 128
    owners: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("striped", "zigzag", "contiguous", "dealt"):
            raise ConfigError("layout.kind", self.kind, "must be striped, zigzag, contiguous or dealt")
        if self.num_tokens < 0:
            raise ConfigError("layout.num_tokens", self.num_tokens, "must not be negative")
        for name in ("world_size", "block"):
            if getattr(self, name) < 1:
                raise ConfigError(f"layout.{name}", getattr(self, name), "must be at least 1")
        if (self.kind == "dealt") != (self.owners is not None):
            raise ConfigError("layout.owners", self.owners, "must be given for kind 'dealt', and only for it")
        if self.owners is not None:
            if len(self.owners) != self.num_blocks:
                raise ConfigError("layout.owners", len(self.owners), f"must name {self.num_blocks} blocks")
            if any(not 0 <= owner < self.world_size for owner in self.owners):
                raise ConfigError("layout.owners", self.owners, f"must be ranks in 0..{self.world_size - 1}")

    @classmethod
    def dealt(
        cls, owners: list[int] | tuple[int, ...], num_tokens: int, world_size: int, block: int = 128
    ) -> SequenceLayout:
        """A layout with an explicit owner rank for every block."""
        return cls("dealt", num_tokens, world_size, block, tuple(int(owner) for owner in owners))

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block)

    @cached_property
    def block_owner(self) -> np.ndarray:
        """Owner rank of every block, int64 [num_blocks]."""
        blocks = np.arange(self.num_blocks)
        if self.kind == "dealt":
            return np.asarray(self.owners, dtype=np.int64)
        if self.kind == "striped":
            return blocks % self.world_size
        chunks = self.world_size if self.kind == "contiguous" else 2 * self.world_size
        # Chunk sizes differ by at most one block.
        chunk = (blocks * chunks) // max(self.num_blocks, 1)
        if self.kind == "contiguous":
            return chunk
        return np.minimum(chunk, chunks - 1 - chunk)

    def blocks(self, rank: int) -> np.ndarray:
        """Ids of the blocks that `rank` holds, ascending, int64."""
        self._check_rank(rank)
        return np.flatnonzero(self.block_owner == rank)

    def length(self, rank: int) -> int:
        """Number of tokens that `rank` holds."""
        owned = self.blocks(rank)
        if not len(owned):
            return 0
        short = self.num_blocks * self.block - self.num_tokens
        return len(owned) * self.block - (short if owned[-1] == self.num_blocks - 1 else 0)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.length(rank) for rank in range(self.world_size))

    def positions(self, rank: int) -> Tensor:
        """Global token ids (document order) of the tokens that `rank` holds, int32 [length(rank)]."""
        ids = (self.blocks(rank)[:, None] * self.block + np.arange(self.block)).reshape(-1)
        return torch.from_numpy(ids[ids < self.num_tokens].astype(np.int32))

    def shard(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """The tokens of `x` along `dim` that `rank` holds, in a new tensor. Raises ValueError on another
        length.
        """
        if x.shape[dim] != self.num_tokens:
            raise ValueError(f"x.shape[{dim}]={x.shape[dim]} must be layout.num_tokens={self.num_tokens}")
        return x.index_select(dim, self.positions(rank).to(x.device, torch.int64))

    def unshard(self, shards: list[Tensor] | tuple[Tensor, ...], dim: int) -> Tensor:
        """The exact inverse of `shard`: the whole tensor from all ranks' shards, in rank order."""
        if len(shards) != self.world_size:
            raise ValueError(f"len(shards)={len(shards)} must be layout.world_size={self.world_size}")
        for rank, shard in enumerate(shards):
            if shard.shape[dim] != self.length(rank):
                raise ValueError(
                    f"shards[{rank}].shape[{dim}]={shard.shape[dim]} must be {self.length(rank)}"
                )
        order = torch.cat([self.positions(rank) for rank in range(self.world_size)]).to(torch.int64)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(self.num_tokens)
        return torch.cat(list(shards), dim=dim).index_select(dim, inverse.to(shards[0].device))

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank={rank} must be in 0..{self.world_size - 1}")
