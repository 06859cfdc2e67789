"""Verticals: single keys that a pattern chose beside its blocks, gathered by value once, up front.

After arXiv 2510.18830 section 3.1, but the selected rows of K and V (below 1 % of them) are all-gathered
before the first step instead of being picked out of passing shards, and their gradients go home in one
reduce-scatter. Wraps any exchange: one more step at the end, over the gathered rows.

Bytes sent by rank r: forward (W - 1) times the bytes of its own selected rows; backward that again plus the
other ranks' rows in the wire type. A key that several query heads selected apart counts once for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ltrain.attention.schedules.all_gather import scatter_sum
from ltrain.attention.schedules.base import Chunk, Exchange, GradientSink, Problem, Step
from ltrain.parallel.collectives import Channel, Traffic
from ltrain_kernels.block_sparse import BlockIndex, ListIndex, prepare

NEVER = torch.iinfo(torch.int32).max


class Tiles(Protocol):
    """Selected keys in tiles: ids int64 [B, Hs, slots], -1 in unused slots, Hs the kv or the query heads.

    index: batch B x Hs, one head, rows the sequence's blocks and columns tiles of `tile` slots.
    """

    ids: Tensor
    index: BlockIndex
    tile: int


class WithVerticals:
    """`inner` and a last step over the verticals; `chunks[i]` are the tokens that member i of the channels
    holds."""

    def __init__(
        self,
        inner: Exchange,
        problem: Problem,
        chunks: list[Chunk],
        kv_channel: Channel,
        grad_channel: Channel,
    ) -> None:
        tiles = problem.verticals
        assert tiles is not None
        self.inner, self.queries = inner, inner.queries
        self.kv_channel, self.grad_channel, self.me = kv_channel, grad_channel, kv_channel.me
        batch, heads, slots = tiles.ids.shape
        self.units, self.slots = batch * heads, slots
        self.ratio = heads // problem.num_kv_heads
        ids = tiles.ids.reshape(self.units, slots).cpu().numpy()
        member = np.full(problem.layout.num_tokens, -1)
        place = np.full(problem.layout.num_tokens, -1)
        for number, chunk in enumerate(chunks):
            tokens = chunk.pos.cpu().numpy()
            member[tokens] = number
            place[tokens] = np.arange(len(tokens))
        unit, slot = np.nonzero(ids >= 0)
        owner = member[ids[unit, slot]]
        order = np.argsort(owner, kind="stable")
        unit, slot, owner = unit[order], slot[order], owner[order]
        self.lengths = np.bincount(owner, minlength=len(chunks)).tolist()
        device = problem.device
        self.unit, self.slot = (torch.from_numpy(x).to(device) for x in (unit, slot))
        mine = owner == self.me
        self.own_place = torch.from_numpy(place[ids[unit[mine], slot[mine]]]).to(device)
        self.own_batch = torch.from_numpy(unit[mine] // heads).to(device)
        self.own_head = torch.from_numpy(unit[mine] % heads).to(device)
        self.steps = [*inner.steps, self._step(problem, tiles)]

    def _step(self, problem: Problem, tiles: Tiles) -> Step:
        ids = tiles.ids.reshape(self.units, self.slots).to(problem.device)
        pos = torch.where(ids < 0, NEVER, ids).to(torch.int32)
        doc = q_doc = None
        if problem.doc_ids is not None:
            heads = self.units // problem.batch
            whole = problem.doc_ids.reshape(-1, problem.layout.num_tokens).to(problem.device)
            whole = whole.expand(problem.batch, -1).repeat_interleave(heads, 0)
            doc = whole.gather(1, ids.clamp(min=0)).to(torch.int32)
            assert self.queries.doc is not None
            q_doc = self.queries.doc.expand(problem.batch, -1).repeat_interleave(heads, 0)
        index = tiles.index.to(problem.device)
        part = index.select(self.queries.blocks, list(range(index.num_cols)))
        plan = prepare(part, q_pos=self.queries.pos, k_pos=pos, q_doc=q_doc, k_doc=doc, window=problem.window)
        return Step(Chunk(np.empty(0, np.int64), pos, doc), plan, folded=True)

    def keys(self, k: Tensor, v: Tensor, traffic: Traffic | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        own = (self.own_place, self.own_batch, torch.div(self.own_head, self.ratio, rounding_mode="floor"))
        order = list(range(len(self.lengths)))
        pending = self.kv_channel.all_gather((k[own], v[own]), self.lengths, order, traffic)
        yield from self.inner.keys(k, v, traffic)
        gathered = []
        for rows in pending.wait():
            buffer = rows.new_zeros((self.slots, self.units, 1, rows.shape[1]))
            buffer[self.slot, self.unit, 0] = rows
            gathered.append(buffer)
        yield len(self.steps) - 1, gathered[0], gathered[1]

    def gradients(self, k: Tensor, v: Tensor, wire: torch.dtype, traffic: Traffic | None) -> VerticalSum:
        return VerticalSum(self, self.inner.gradients(k, v, wire, traffic), wire, traffic)


class VerticalSum:
    """The inner exchange's sink, and the verticals' gradients: one all-to-all, added up in member order."""

    def __init__(
        self, plan: WithVerticals, inner: GradientSink, wire: torch.dtype, traffic: Traffic | None
    ) -> None:
        self.plan, self.inner, self.wire, self.traffic = plan, inner, wire, traffic
        self.sums: tuple[Tensor, Tensor] | None = None

    def put(self, number: int, dk: Tensor, dv: Tensor) -> None:
        plan = self.plan
        if number + 1 < len(plan.steps):
            self.inner.put(number, dk, dv)
            return
        rows = [x[plan.slot, plan.unit, 0] for x in (dk, dv)]
        order = list(range(len(plan.lengths)))
        self.sums = scatter_sum(
            plan.grad_channel, plan.lengths, order, rows[0], rows[1], self.wire, self.traffic
        )

    def finish(self) -> tuple[Tensor, Tensor]:
        totals, plan = self.inner.finish(), self.plan
        assert self.sums is not None
        for total, rows in zip(totals, self.sums, strict=True):
            for turn in range(plan.ratio):
                # Query heads of one kv head may have chosen the same key: one head of each group at a time.
                here = plan.own_head % plan.ratio == turn
                kv = torch.div(plan.own_head[here], plan.ratio, rounding_mode="floor")
                total[plan.own_place[here], plan.own_batch[here], kv] += rows[here]
        return totals


class SelectedTiles:
    """The tiles of some heads of the selection, repeated where a head is named twice."""

    def __init__(self, tiles: Tiles, heads: Sequence[int]) -> None:
        batch, all_heads, _ = tiles.ids.shape
        self.ids = tiles.ids[:, list(heads)]
        self.tile = tiles.tile
        index = tiles.index.to_lists()
        pointers, columns, at = [], [], 0
        for b in range(batch):
            for head in heads:
                own = index.row_ptr[b * all_heads + head]
                start, stop = int(own[0, 0]), int(own[0, -1])
                pointers.append(own - start + at)
                columns.append(index.col[start:stop])
                at += stop - start
        ptr = torch.stack(pointers) if pointers else index.row_ptr[:0]
        col = torch.cat(columns) if columns else index.col[:0]
        self.index: BlockIndex = ListIndex(ptr, col, index.num_cols, index.block_q, index.block_k)
