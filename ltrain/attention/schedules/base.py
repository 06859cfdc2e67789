"""What every context-parallel schedule is made of: chunks of tokens, steps over them, feeds and sinks.

A schedule is a plan (which key/value chunk meets this rank's queries at which step) with two movers: `keys`
brings the chunks, the next one in flight while the present one is worked on, and `gradients` takes the
partial dK and dV of each step home, where their owner sums them in a fixed order. One driver (`engine`) runs
any of them, both ways.

Shape legend, schedules only: T tokens first, then B batch, K kv heads, D head size; tensors of shape [T, B,
K, D] concatenate along tokens without copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ltrain.parallel.collectives import Traffic
from ltrain.parallel.layout import SequenceLayout
from ltrain_kernels.block_sparse import BlockIndex, Plan, prepare


@dataclass(frozen=True)
class Chunk:
    """Some blocks of the sequence in the order in which a buffer holds them; only the last one may be short.

    pos int32 [T] and doc int32 [B|1, T] (None without documents) describe the tokens.
    """

    blocks: np.ndarray
    pos: Tensor
    doc: Tensor | None

    @property
    def num_tokens(self) -> int:
        return len(self.pos)


@dataclass(frozen=True)
class Step:
    """One attention call: this rank's queries against `keys`, over the pairs that `plan` finds visible.

    `tiles` is the number of blocks that are worked on, counted over the heads of the index. With `folded` the
    kv heads hold different tokens: they are folded into the batch (k [T, B x K, 1, D], positions and
    documents [B x K, T]).
    """

    keys: Chunk
    plan: Plan
    folded: bool = False

    @property
    def tiles(self) -> int:
        return self.plan.nnz

    def head_tiles(self, num_heads: int) -> float:
        """Square blocks that are worked on, counted over all `num_heads` (batch x query heads)."""
        batch, heads, _ = self.plan.rows.mid.shape
        index = self.plan.index
        return self.tiles * num_heads * index.block_k / max(batch * heads * index.block_q, 1)


@dataclass(frozen=True)
class Problem:
    """What all ranks know: the sequence, who holds it, what is to be attended, and the shapes of q, k and
    v."""

    layout: SequenceLayout
    index: BlockIndex
    doc_ids: Tensor | None
    batch: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None = None
    verticals: Any = None
    token_ids: Tensor | None = None

    def positions(self, ids: Tensor) -> Tensor:
        """What causality and windows go by for tokens `ids` of the sequence."""
        return ids if self.token_ids is None else self.token_ids.to(ids)[ids]

    @property
    def group_size(self) -> int:
        return self.num_q_heads // max(self.num_kv_heads, 1)

    def head_work(self) -> np.ndarray:
        """Selected blocks of every query head, [num_q_heads]: what Ulysses deals by."""
        counts = self.index.drop_future().counts().sum((0, 2)).cpu().numpy()
        return np.repeat(counts, self.num_q_heads // len(counts))

    def chunk(self, ranks: Sequence[int]) -> tuple[Chunk, list[int]]:
        """The shards of `ranks` as one chunk, and the order in which it holds them: a short block must come
        last."""
        order = self.order(ranks)
        blocks = (
            np.concatenate([self.layout.blocks(rank) for rank in order]) if order else np.empty(0, np.int64)
        )
        return self.chunk_of(blocks), order

    def order(self, ranks: Sequence[int]) -> list[int]:
        """`ranks` with the owner of a short last block moved to the end."""
        layout = self.layout
        if layout.num_tokens % layout.block == 0:
            return list(ranks)
        owner = int(layout.block_owner[-1])
        return [rank for rank in ranks if rank != owner] + [rank for rank in ranks if rank == owner]

    def chunk_of(self, blocks: np.ndarray) -> Chunk:
        ids = (blocks[:, None] * self.layout.block + np.arange(self.layout.block)).reshape(-1)
        ids = torch.from_numpy(ids[ids < self.layout.num_tokens])
        doc = None
        if self.doc_ids is not None:
            doc = self.doc_ids.reshape(-1, self.layout.num_tokens)[:, ids.to(self.doc_ids.device)]
            doc = doc.to(self.device, torch.int32)
        return Chunk(blocks, self.positions(ids).to(self.device, torch.int32), doc)


class GradientSink(Protocol):
    """Takes the partial gradients of each step to the owners of the keys."""

    def put(self, number: int, dk: Tensor, dv: Tensor) -> None:
        """Partial gradients of step `number`, fp32 (fp64 for fp64 inputs), shaped like that step's keys and
        values."""

    def finish(self) -> tuple[Tensor, Tensor]:
        """dK and dV of this rank's own shard, summed over all ranks."""


class Exchange(Protocol):
    """A schedule planned for one rank."""

    queries: Chunk
    steps: list[Step]

    def keys(self, k: Tensor, v: Tensor, traffic: Traffic | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(step number, k, v) for every step, from this rank's own shards [T, B, K, D] and [T, B, K, Dv]."""

    def gradients(self, k: Tensor, v: Tensor, wire: torch.dtype, traffic: Traffic | None) -> GradientSink:
        """A sink for the backward pass; partial gradients of other ranks' keys travel as `wire`."""


def make_step(problem: Problem, queries: Chunk, keys: Chunk) -> Step:
    """The step that joins two chunks over the part of the problem's index that lies between them."""
    part = problem.index.select(queries.blocks, keys.blocks)
    plan = prepare(
        part, q_pos=queries.pos, k_pos=keys.pos, q_doc=queries.doc, k_doc=keys.doc, window=problem.window
    )
    return Step(keys, plan)


def select_heads(index: BlockIndex, q_heads: Sequence[int], num_q_heads: int) -> BlockIndex:
    """The index of these query heads; an index that all heads share stays as it is."""
    if index.heads == 1:
        return index
    group = num_q_heads // index.heads
    return index.select_heads([head // group for head in q_heads])


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which partial results are held: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
