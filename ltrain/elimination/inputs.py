"""What a scorer sees of a layer: block means of the normed hidden states, their projections, or all tokens'.

Everything is computed without gradient. Only vectors of blocks cross ranks. Sums over a block are made from
that block alone, and every product over blocks has the same shape on any number of context-parallel ranks, so
that the scores are the same numbers.

T tokens of this context-parallel rank, N blocks of the sequence, E hidden size, H and K heads of this
tensor-parallel rank, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltrain.attention.context import AttentionContext
from ltrain.attention.patterns.exchange import Gather, Place, Steps
from ltrain.attention.patterns.pooling import run_means, valid_tokens
from ltrain.attention.rope import Rope, apply_rope
from ltrain.attention.select import run_on_group
from ltrain.elimination.pooled import mean_tables
from ltrain.elimination.sequence import BlockedSequence

# Blocks that are normed at a time.
_CHUNK = 64


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """A layer's residual x [S, 1, E] as attention would get it, and how it is normed and projected.

    S is T, or this rank's part of T under sequence parallelism (`sharded`). `step`, `seed`, `layer` and the
    context's key name the call for scorers that draw numbers.
    """

    x: Tensor
    norm: nn.Module
    attention: Any
    context: AttentionContext
    sequence: BlockedSequence
    layer: int
    step: int
    seed: int

    @property
    def sharded(self) -> bool:
        return bool(self.attention.config.sequence_parallel)

    @property
    def place(self) -> Place:
        layout = self.sequence.layout
        return Place(self.context.rank, layout.world_size, layout.block_owner, layout.block)

    @property
    def rope(self) -> Rope:
        return self.attention.core_attention.settings.rope

    def hidden_means(self, *, keys: bool) -> Tensor:
        """Means of normed hidden states over every block, fp32 [N, E], equal on all ranks.

        Where documents meet in a block the mean is over its last document's tokens (`keys`) or over its first
        document's.
        """
        sums = self._own_sums(keys=keys)
        return self.gather(sums / self._valid(keys=keys).sum(1, keepdim=True).clamp(min=1))

    def _valid(self, *, keys: bool) -> Tensor:
        """Tokens that enter the means of this rank's blocks, bool [own blocks, block]; once for all
        layers."""

        def make() -> Tensor:
            valid = valid_tokens([self.sequence.documents], self.place.blocks, keys=keys)[0]
            return valid.to(self.x.device)

        return self.context.cached(("valid", keys, self.sequence.block), make)

    def gather(self, rows: Tensor) -> Tensor:
        """A vector for each of this rank's blocks -> one for every block of the sequence."""
        place = self.place

        def steps() -> Steps:
            return (yield Gather(rows.contiguous(), place.block_owner))

        return run_on_group(steps(), self.context.group, place.world_size, place.rank)

    def _own_sums(self, *, keys: bool) -> Tensor:
        """fp32 sums over the valid tokens of this context-parallel rank's blocks, [own blocks, E]."""
        place, block = self.place, self.sequence.block
        count = len(place.blocks)
        length = self.sequence.layout.length(place.rank)
        valid = self._valid(keys=keys).reshape(-1)[:length]
        group = self.attention.pg_collection.tp
        ranks, me = (group.size(), group.rank()) if self.sharded else (1, 0)
        size = length // ranks
        # Tensor-parallel ranks may share a block: they add up units that lie in one of their parts.
        unit = block if ranks == 1 else math.gcd(block, size)
        mine = valid[me * size : (me + 1) * size]
        sums = []
        for first in range(0, size, _CHUNK * unit):
            part = slice(first, min(first + _CHUNK * unit, size))
            rows = self.norm(self.x[part, 0]).float() * mine[part, None]
            missing = -len(rows) % unit
            sums.append(torch.nn.functional.pad(rows, (0, 0, 0, missing)).unflatten(0, (-1, unit)).sum(1))
        units = torch.cat(sums) if sums else self.x.new_zeros(0, self.x.shape[2], dtype=torch.float32)
        if ranks > 1:
            whole = units.new_empty(ranks * len(units), units.shape[1])
            dist.all_gather_into_tensor(whole, units.contiguous(), group=group)
            units = whole
        per_block = block // unit
        units = torch.nn.functional.pad(units, (0, 0, 0, count * per_block - len(units)))
        return units.unflatten(0, (count, per_block)).sum(1)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """q [n, H, D] and k [n, K, D], heads normed, not rotated, of normed hidden states [n, E]."""
        weight = self.attention.linear_qkv.weight
        with _whole_input(self.attention.linear_qkv):
            q, k, _ = self.attention.get_query_key_value_tensors(hidden.to(weight.dtype).unsqueeze(1))
        return q[:, 0], k[:, 0]

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """q [1, T, H, D] and k [1, T, K, D] of every token of this context-parallel rank, heads normed, not
        rotated."""
        q, k, _ = self.attention.get_query_key_value_tensors(self.norm(self.x))
        return q.transpose(0, 1), k.transpose(0, 1)

    def rotated_means(self, *, keys: bool) -> Tensor:
        """Means over every block of rotated queries [N, H, D] or keys [N, K, D], fp32: each token's own."""
        q, k = self.queries_and_keys()
        tables = self.attention.core_attention.rotary_tables(self.context, q.device)
        x = apply_rope(k if keys else q, *tables)
        means = run_means(x, self.place, [self.sequence.documents], self.sequence.block, keys=keys)
        return self.gather(means[:, 0, 0])

    def mean_rotation(self, *, keys: bool) -> tuple[Tensor, Tensor]:
        """Mean rotary cos and sin of every block, fp32 [N, D / 2]; once for all layers."""

        def make() -> tuple[Tensor, Tensor]:
            docs, block = self.sequence.documents, self.sequence.block
            parts = []
            for first in range(0, self.sequence.num_blocks, _CHUNK):
                blocks = np.arange(first, min(first + _CHUNK, self.sequence.num_blocks))
                ids = (blocks[:, None] * block + np.arange(block)).reshape(-1)
                start = docs.starts[np.searchsorted(docs.starts, ids, side="right") - 1]
                tables = self.rope.tables(torch.from_numpy(ids - start), device=self.x.device)
                valid = valid_tokens([docs], blocks, keys=keys)[0].to(self.x.device)
                parts.append(mean_tables(tables, valid))
            cos, sin = zip(*parts, strict=True)
            return torch.cat(cos), torch.cat(sin)

        return self.context.cached(("mean rotation", keys, self.sequence.block), make)

    def token_counts(self, *, keys: bool) -> Tensor:
        """Tokens behind each block's mean, int64 [N]; once for all layers."""

        def make() -> Tensor:
            blocks = np.arange(self.sequence.num_blocks)
            return valid_tokens([self.sequence.documents], blocks, keys=keys)[0].sum(1).to(self.x.device)

        return self.context.cached(("token counts", keys, self.sequence.block), make)

    def earliest_visible(self) -> Tensor:
        """The earliest block that a block's first document sees, int64 [N]; once for all layers."""
        return self.context.cached(
            ("low", self.sequence.block),
            lambda: torch.from_numpy(self.sequence.documents.low).to(self.x.device),
        )

    def sum_over_heads(self, scores: Tensor) -> Tensor:
        """Scores summed over the tensor-parallel ranks, in rank order, so that all get the same bits."""
        group = self.attention.pg_collection.tp
        if group.size() == 1:
            return scores
        parts = scores.new_empty(group.size(), *scores.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), scores.contiguous(), group=group)
        return parts.sum(0)


@contextmanager
def _whole_input(linear: Any) -> Iterator[None]:
    """The linear takes an input that all tensor-parallel ranks hold whole, not their parts of it."""
    sharded = linear.sequence_parallel
    linear.sequence_parallel = False
    try:
        yield
    finally:
        linear.sequence_parallel = sharded
