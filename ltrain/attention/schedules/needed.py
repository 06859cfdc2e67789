"""Needed blocks only: an all-to-all of exactly the key blocks that some query block of another rank selected.

Planned from the index: for each rank and head, which remote blocks its queries visit. This is the exchange
for static sparse patterns; for S2 (head-sharded strided context) it moves each kv head's own residue of the
blocks and the halo of the local window, so it costs T / stride a head instead of T, with any number of ranks
or heads.

Where kv heads need different blocks, each head's blocks are compacted apart and heads are folded into the
batch. Bytes sent by rank r: forward, the sum over other ranks and kv heads of the tokens of r's blocks that
they need, times the bytes of a head's key and value; backward that again plus the same in the wire type.
Memory beyond inputs and outputs: the blocks needed from others (kv heads times the largest head's where they
differ), once, and backward their gradients in fp32 and on the wire.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ltrain.attention.schedules.base import Chunk, Problem, Step, make_step, partial_dtype
from ltrain.parallel.collectives import Channel, Pending, Traffic
from ltrain_kernels.block_sparse import BlockIndex, ClosedIndex, ListIndex, prepare

NEVER = torch.iinfo(torch.int32).max


def needed_blocks(problem: Problem) -> NeededBlocks:
    """Which kv head of which rank visits which block of another rank.

    Counts only blocks with a visible pair: causal, of a common document, in the window. Where the index is a
    closed form over one document, so is the answer: a row of it costs O(blocks), and no entry is listed.
    """
    index, doc = problem.index, problem.doc_ids
    one_document = doc is None or bool((doc == doc.reshape(-1)[:1]).all())
    if isinstance(index, ClosedIndex) and one_document and problem.token_ids is None:
        return _ClosedNeeds(problem, index)
    return _ListedNeeds(problem)


class NeededBlocks(Protocol):
    """`of(rank)`: bool [kv heads, or 1 where all need the same; blocks], own blocks left out."""

    classes: int

    def of(self, rank: int) -> np.ndarray: ...


class _ClosedNeeds:
    """A rank needs the sinks and strided columns up to its last row and the nearest blocks of its rows, all
    within the window."""

    def __init__(self, problem: Problem, index: ClosedIndex) -> None:
        self.owner, block = problem.layout.block_owner, problem.layout.block
        self.reach = len(self.owner)
        if problem.window is not None:
            self.reach = (problem.window + block - 2) // block
        params = index.params.cpu().numpy()
        heads = np.arange(problem.num_kv_heads) * len(params) // problem.num_kv_heads
        if len(params) > problem.num_kv_heads:
            # Query heads of one kv head need what any of them visits.
            group = len(params) // problem.num_kv_heads
            self.params = params.reshape(problem.num_kv_heads, group, 4)
        else:
            self.params = params[heads][:, None]
        if (self.params == self.params[:1]).all():
            self.params = self.params[:1]
        self.classes = len(self.params)

    def of(self, rank: int) -> np.ndarray:
        column, own = np.arange(len(self.owner)), np.flatnonzero(self.owner == rank)
        found = np.zeros((self.classes, len(column)), bool)
        # How far back the nearest own row at or after a column sees it; what follows the last row is unseen.
        seen = column <= (own[-1] if len(own) else -1)
        distance = np.full(len(column), len(column))
        distance[seen] = own[np.searchsorted(own, column[seen])] - column[seen]
        for kept, heads in zip(found, self.params, strict=True):
            for local, sinks, stride, residue in heads:
                kept |= (distance < local) | (column < sinks)
                if stride:
                    kept |= column % stride == residue
        found &= seen & (distance <= self.reach) & (self.owner != rank)
        return found


class _ListedNeeds:
    """Read off the entries of the index, refined by positions, documents and window."""

    def __init__(self, problem: Problem) -> None:
        layout = problem.layout
        pos = problem.positions(torch.arange(layout.num_tokens)).to(torch.int32)
        doc = problem.doc_ids.cpu() if problem.doc_ids is not None else None
        plan = prepare(
            problem.index.to("cpu"), q_pos=pos, k_pos=pos, q_doc=doc, k_doc=doc, window=problem.window
        )
        ptr, col = plan.rows.ptr.numpy(), plan.rows.ids.numpy()
        batch, heads, rows = plan.rows.mid.shape
        counts = ptr[..., 1:] - ptr[..., :-1]
        owner = layout.block_owner
        classes = 1 if heads == 1 else problem.num_kv_heads
        found = np.zeros((layout.world_size, classes, layout.num_blocks), bool)
        at = 0
        for b in range(batch):
            for head in range(heads):
                total = int(counts[b, head].sum())
                row = np.repeat(np.arange(rows), counts[b, head])
                kv = 0 if heads == 1 else head * classes // heads
                found[owner[row], kv, col[at : at + total]] = True
                at += total
        found[owner, :, np.arange(layout.num_blocks)] = False
        if classes > 1 and (found == found[:, :1]).all():
            found = found[:, :1]
        self.found, self.classes = found, found.shape[1]

    def of(self, rank: int) -> np.ndarray:
        return self.found[rank]


@dataclass(frozen=True)
class Rows:
    """Blocks of a buffer to move, in wire order: first token, tokens and head class of each, int64, and how
    many tokens go to each member. `token` and `head` say the same for every token; they are made for a call
    and not kept.
    """

    start: Tensor
    length: Tensor
    of_class: Tensor
    sizes: list[int]

    @property
    def token(self) -> Tensor:
        before = self.length.cumsum(0) - self.length
        total = sum(self.sizes)
        offset = (self.start - before).repeat_interleave(self.length, output_size=total)
        return offset + torch.arange(total, device=self.start.device)

    @property
    def head(self) -> Tensor:
        return self.of_class.repeat_interleave(self.length, output_size=sum(self.sizes))

    @property
    def nbytes(self) -> int:
        return self.start.nbytes + self.length.nbytes + self.of_class.nbytes


def rows_of(problem: Problem, held: list[np.ndarray], wanted: Iterable[np.ndarray]) -> Rows:
    """Rows of the blocks wanted by (or of) each member, bool [classes, blocks], in a buffer that holds the
    blocks held[g] of class g.
    """
    layout = problem.layout
    place = np.full((len(held), layout.num_blocks), -1)
    for g, blocks in enumerate(held):
        place[g, blocks] = np.arange(len(blocks))
    starts, lengths, heads, sizes = [], [], [], []
    for of_member in wanted:
        head, block = np.nonzero(of_member)
        tokens = np.minimum(layout.block, layout.num_tokens - block * layout.block)
        starts.append(place[head, block] * layout.block)
        lengths.append(tokens)
        heads.append(head)
        sizes.append(int(tokens.sum()))
    columns = (torch.from_numpy(np.concatenate(x)).to(problem.device) for x in (starts, lengths, heads))
    return Rows(*columns, sizes)


class Needed:
    """`pairwise` sends point to point to those members only that need something (see `halo`)."""

    def __init__(
        self,
        problem: Problem,
        queries: Chunk,
        kv_channel: Channel,
        grad_channel: Channel,
        needed: NeededBlocks,
        pairwise: bool = False,
    ) -> None:
        self.problem, self.queries, self.pairwise = problem, queries, pairwise
        self.kv_channel, self.grad_channel = kv_channel, grad_channel
        self.classes = needed.classes
        self.me = kv_channel.me
        mine = needed.of(self.me)
        self.blocks = [np.flatnonzero(mine[g]) for g in range(self.classes)]
        self.width = max(len(b) for b in self.blocks) * problem.layout.block
        owner, peers = problem.layout.block_owner, range(kv_channel.size)
        at_home = [queries.blocks] * self.classes
        self.out = rows_of(problem, at_home, (needed.of(peer) & (owner == self.me) for peer in peers))
        self.into = rows_of(problem, self.blocks, (mine & (owner == peer) for peer in peers))
        self.steps = [make_step(problem, queries, queries), self._remote_step()]

    def _remote_step(self) -> Step:
        problem, batch = self.problem, self.problem.batch
        layout = problem.layout
        slots = self.width // layout.block
        pos = torch.full((self.classes, self.width), NEVER, dtype=torch.int64)
        for g, blocks in enumerate(self.blocks):
            ids = torch.from_numpy((blocks[:, None] * layout.block + np.arange(layout.block)).reshape(-1))
            ids = ids[ids < layout.num_tokens]
            pos[g, : len(ids)] = ids
        doc = q_doc = None
        folded = self.classes > 1
        if problem.doc_ids is not None:
            whole = problem.doc_ids.reshape(-1, layout.num_tokens).cpu()
            whole = torch.nn.functional.pad(whole, (0, 1), value=-1)
            doc = whole[:, pos.clamp(max=layout.num_tokens)]
            assert self.queries.doc is not None
            q_doc = self.queries.doc
            if folded:
                doc = doc.expand(batch, -1, -1).reshape(batch * self.classes, self.width)
                q_doc = q_doc.expand(batch, -1).repeat_interleave(self.classes, 0)
            else:
                doc = doc[:, 0]
            doc = doc.to(problem.device, torch.int32)
        there = pos != NEVER
        pos[there] = problem.positions(pos[there])
        pos = pos.to(problem.device, torch.int32)
        if folded:
            index = self._folded_index(slots)
            key_pos = pos.repeat(batch, 1)
        else:
            index = problem.index.select(self.queries.blocks, self.blocks[0])
            key_pos = pos[0]
        plan = prepare(
            index, q_pos=self.queries.pos, k_pos=key_pos, q_doc=q_doc, k_doc=doc, window=problem.window
        )
        return Step(Chunk(np.concatenate(self.blocks), key_pos, doc), plan, folded)

    def _folded_index(self, slots: int) -> ListIndex:
        index = self.problem.index
        per_class = index.heads // self.classes
        parts = []
        for g, blocks in enumerate(self.blocks):
            heads = list(range(g * per_class, (g + 1) * per_class))
            parts.append(index.select_heads(heads).select(self.queries.blocks, blocks))
        return fold_indices(parts, self.problem.batch, slots)

    def keys(self, k: Tensor, v: Tensor, traffic: Traffic | None) -> Iterator[tuple[int, Tensor, Tensor]]:
        shapes = [self._grouped(x).shape for x in (k, v)]
        token, head = self.out.token, self.out.head
        leaving = [self._grouped(x)[token, :, head] for x in (k, v)]
        pending = self._move(self.kv_channel, leaving, self.out.sizes, self.into.sizes, traffic)
        yield 0, k, v
        compact = []
        token, head = self.into.token, self.into.head
        for arrived, shape in zip(pending.wait(), shapes, strict=True):
            buffer = arrived.new_zeros((self.width, *shape[1:]))
            buffer[token, :, head] = arrived
            compact.append(self._ungrouped(buffer))
        yield 1, compact[0], compact[1]

    def gradients(self, k: Tensor, v: Tensor, wire: torch.dtype, traffic: Traffic | None) -> NeededSum:
        return NeededSum(self, k, v, wire, traffic)

    def _grouped(self, x: Tensor) -> Tensor:
        """[T, B, K, D] as [T, B, classes, K / classes x D]."""
        columns = self.problem.batch * self.classes
        return x.reshape(len(x), self.problem.batch, self.classes, math.prod(x.shape[1:]) // columns)

    def _ungrouped(self, x: Tensor) -> Tensor:
        """The kernels' form of a grouped buffer: heads of their own batch entry where they differ."""
        heads = 1 if self.classes > 1 else self.problem.num_kv_heads
        return x.reshape(len(x), self.problem.batch * self.classes, heads, x.shape[3] // heads)

    def _move(
        self,
        channel: Channel,
        rows: list[Tensor],
        sizes: list[int],
        arriving: list[int],
        traffic: Traffic | None,
    ) -> Pending:
        """Send rows [n, B, F] of each tensor to the members, `sizes[i]` rows to member i."""
        into = [x.new_empty((sum(arriving), *x.shape[1:])) for x in rows]
        if self.pairwise:
            sends, receives = [], []
            for x, y in zip(rows, into, strict=True):
                sends += list(enumerate(x.split(sizes)))
                receives += list(enumerate(y.split(arriving)))
            pending = channel.exchange(sends, receives, traffic)
            return Pending(pending.works, tuple(into), pending.keep, traffic)
        works: list = []
        keep: list[Tensor] = []
        for number, x in enumerate(rows):
            width = x[0].numel() if len(x) else x.shape[1] * x.shape[2]
            one = channel.all_to_all(
                x.reshape(-1), [n * width for n in sizes], [n * width for n in arriving], traffic
            )
            into[number] = one.received[0].view(into[number].shape)
            works += one.works
            keep += [*one.keep]
        return Pending(works, tuple(into), tuple(keep), traffic)


class NeededSum:
    """Remote blocks' partial dK and dV go back the way the blocks came; the owner adds them in rank order."""

    def __init__(
        self, plan: Needed, k: Tensor, v: Tensor, wire: torch.dtype, traffic: Traffic | None
    ) -> None:
        self.plan, self.wire, self.traffic = plan, wire, traffic
        self.sums = [torch.zeros(x.shape, dtype=partial_dtype(k.dtype), device=x.device) for x in (k, v)]
        self.pending: Pending | None = None

    def put(self, number: int, dk: Tensor, dv: Tensor) -> None:
        if number == 0:
            for total, part in zip(self.sums, (dk, dv), strict=True):
                total += part
            return
        plan = self.plan
        token, head = plan.into.token, plan.into.head
        rows = [plan._grouped(x)[token, :, head].to(self.wire) for x in (dk, dv)]
        self.pending = plan._move(plan.grad_channel, rows, plan.into.sizes, plan.out.sizes, self.traffic)

    def finish(self) -> tuple[Tensor, Tensor]:
        plan = self.plan
        if self.pending is not None:
            token, head = plan.out.token, plan.out.head
            for total, arrived in zip(self.sums, self.pending.wait(), strict=True):
                grouped = plan._grouped(total)
                at = 0
                for size in plan.out.sizes:
                    # One member asks for a token of a head at most once: no two rows of a member collide.
                    place = (token[at : at + size], slice(None), head[at : at + size])
                    grouped[place] += arrived[at : at + size]
                    at += size
        return self.sums[0], self.sums[1]


def fold_indices(parts: list[ListIndex], batch: int, num_cols: int) -> BlockIndex:
    """Indices of equal rows and heads as one index of batch `batch` x len(parts), batch-major."""
    block_q, block_k, rows = parts[0].block_q, parts[0].block_k, parts[0].num_rows
    pointers, columns, at = [], [], 0
    for b in range(batch):
        for part in parts:
            own = part.row_ptr[b if part.batch > 1 else 0]
            start, stop = int(own.min()), int(own.max())
            pointers.append(own - start + at)
            columns.append(part.col[start:stop])
            at += stop - start
    assert all(part.num_rows == rows for part in parts)
    return ListIndex(torch.stack(pointers), torch.cat(columns), num_cols, block_q, block_k)
