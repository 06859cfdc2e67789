"""Ulysses: an all-to-all trades the shard of the sequence for a shard of the heads (arXiv 2309.14509).

Each member then attends with its heads over all members' tokens and sends the result back. Heads need not
divide evenly; where there are fewer KV heads than members, a KV head goes to every member that holds a query
head of it. Heads are dealt by their work when the index gives heads different densities, longest first, never
more than ceil(heads / members) to one member.

Bytes sent by rank r with s tokens of b bytes, when members get equal heads: (W - 1) / W x s x b x (Hq (D +
Dv) + Hkv' (D + Dv)) and 4 bytes a head and token of lse, forward; Hkv' counts replicated KV heads. Backward
without saved copies (after activation checkpointing) fetches q, k, v again.
Memory beyond inputs and outputs: the same tensors once more in the other layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ltrain.attention.schedules.base import Exchange, Problem, select_heads
from ltrain.attention.schedules.engine import make_delta, run_backward, run_forward, tokens_first
from ltrain.attention.schedules.verticals import SelectedTiles
from ltrain.parallel.collectives import Channel, Traffic


@dataclass(frozen=True)
class HeadDeal:
    """Which query and kv heads every member works on; `kv_of_q[i]` places member i's query heads on its kv
    heads.

    Where `grouped[i]`, kv_of_q[i] is what grouped-query attention takes for granted (equal runs); otherwise
    the kv heads are to be expanded locally, one for each query head.
    """

    q_heads: tuple[tuple[int, ...], ...]
    kv_heads: tuple[tuple[int, ...], ...]
    kv_of_q: tuple[tuple[int, ...], ...]
    grouped: tuple[bool, ...]

    @property
    def num_q(self) -> int:
        return sum(len(heads) for heads in self.q_heads)

    @property
    def num_kv(self) -> int:
        return 1 + max((head for heads in self.kv_heads for head in heads), default=-1)


def deal_heads(num_q: int, num_kv: int, members: int, work: np.ndarray | None = None) -> HeadDeal:
    """Deal heads to `members`: whole KV groups where there are enough of them, single query heads otherwise.

    `work[h]` is the cost of query head h (None: all equal). Heads keep their order inside a member.
    """
    work = np.ones(num_q) if work is None else np.asarray(work, dtype=float)
    group = num_q // num_kv
    unit = group if num_kv >= members else 1
    costs = work.reshape(-1, unit).sum(1)
    units = len(costs)
    if np.ptp(costs) <= 0.01 * max(costs.max(), 1e-30):
        owner = np.repeat(np.arange(members), [len(a) for a in np.array_split(np.arange(units), members)])
    else:
        owner, room, load = np.empty(units, int), np.full(members, -(-units // members)), np.zeros(members)
        for u in np.argsort(-costs, kind="stable"):
            best = int(np.argmin(np.where(room > 0, load, np.inf)))
            owner[u] = best
            load[best] += costs[u]
            room[best] -= 1
    q_heads, kv_heads, kv_of_q, grouped = [], [], [], []
    for member in range(members):
        mine = [int(h) for u in np.flatnonzero(owner == member) for h in range(u * unit, (u + 1) * unit)]
        kv = sorted({h // group for h in mine})
        place = [kv.index(h // group) for h in mine]
        q_heads.append(tuple(mine))
        kv_heads.append(tuple(kv))
        kv_of_q.append(tuple(place))
        even = bool(kv) and len(mine) % len(kv) == 0
        grouped.append(even and place == [i // (len(mine) // len(kv)) for i in range(len(mine))])
    return HeadDeal(tuple(q_heads), tuple(kv_heads), tuple(kv_of_q), tuple(grouped))


class HeadExchange:
    """The two all-to-alls over the members of a channel. Tensors are [T, B, H, D]; tokens of all members are
    laid out in the member order `order` (`Problem.order`)."""

    def __init__(self, channel: Channel, lengths: list[int], order: list[int], deal: HeadDeal) -> None:
        self.channel, self.lengths, self.order, self.deal = channel, lengths, order, deal
        self.me, self.members = channel.me, range(channel.size)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    def to_heads(self, by_q: list[Tensor], by_kv: list[Tensor], traffic: Traffic | None) -> list[Tensor]:
        """This member's heads of all members' tokens; one all-to-all of tensors of one type."""
        tensors = [(x, self.deal.q_heads) for x in by_q] + [(x, self.deal.kv_heads) for x in by_kv]
        parts = [x[:, :, _place(heads[m])].reshape(-1) for m in self.members for x, heads in tensors]
        length = self.lengths[self.me]
        row = [sum(x.shape[1] * len(h[m]) * x.shape[3] for x, h in tensors) for m in self.members]
        (flat,) = self.channel.all_to_all(
            torch.cat(parts),
            [length * row[m] for m in self.members],
            [self.lengths[m] * row[self.me] for m in self.members],
            traffic,
        ).wait()
        pieces, at = {}, 0
        for source in self.members:
            for number, (x, heads) in enumerate(tensors):
                shape = (self.lengths[source], x.shape[1], len(heads[self.me]), x.shape[3])
                count = math.prod(shape)
                pieces[source, number] = flat[at : at + count].view(shape)
                at += count
        return [torch.cat([pieces[s, n] for s in self.order]) for n in range(len(tensors))]

    def to_tokens(
        self, by_q: list[Tensor], by_kv: list[Tensor], wire: torch.dtype, traffic: Traffic | None
    ) -> list[Tensor]:
        """The inverse: all heads of this member's tokens, from tensors with this member's heads of all
        tokens.

        Heads that several members hold (replicated KV) are added up in member order, in the wider of `wire`
        and fp32.
        """
        tensors = [(x, self.deal.q_heads, self.deal.num_q) for x in by_q]
        tensors += [(x, self.deal.kv_heads, self.deal.num_kv) for x in by_kv]
        starts, at = {}, 0
        for member in self.order:
            starts[member] = at
            at += self.lengths[member]
        parts = [
            x[starts[m] : starts[m] + self.lengths[m]].reshape(-1).to(wire)
            for m in self.members
            for x, _, _ in tensors
        ]
        length = self.lengths[self.me]
        row = [sum(x.shape[1] * len(h[m]) * x.shape[3] for x, h, _ in tensors) for m in self.members]
        (flat,) = self.channel.all_to_all(
            torch.cat(parts),
            [self.lengths[m] * row[self.me] for m in self.members],
            [length * row[m] for m in self.members],
            traffic,
        ).wait()
        sums = torch.promote_types(wire, torch.float32)
        out = [
            torch.zeros((length, x.shape[1], num, x.shape[3]), dtype=sums, device=x.device)
            for x, _, num in tensors
        ]
        at = 0
        for source in self.members:
            for whole, (x, heads, _) in zip(out, tensors, strict=True):
                shape = (length, x.shape[1], len(heads[source]), x.shape[3])
                count = math.prod(shape)
                whole[:, :, _place(heads[source])] += flat[at : at + count].view(shape)
                at += count
        return out


def _place(heads: tuple[int, ...]) -> slice | list[int]:
    """The heads as an index; a slice where they are consecutive, which costs no index tensor."""
    if heads and heads == tuple(range(heads[0], heads[0] + len(heads))):
        return slice(heads[0], heads[0] + len(heads))
    return list(heads)


class HeadSharded:
    """Ulysses around an inner exchange: `inner` attends with this member's heads over the tokens of
    `heads.order`.

    With a channel of one member outside, `inner` is a single local step (plain Ulysses); otherwise it's a
    ring of groups, the 2D schedule.
    """

    def __init__(self, heads: HeadExchange, inner: Exchange) -> None:
        self.heads, self.inner = heads, inner
        me = heads.me
        # Kernels take equal runs of query heads for each kv head; irregular deals are expanded to one kv head
        # each.
        self.expand = None if heads.deal.grouped[me] else list(heads.deal.kv_of_q[me])

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, traffic: Traffic | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        qh, kh, vh = self._to_heads([q], [k, v], traffic)
        out, lse = run_forward(self.inner, qh, self._expanded(kh), self._expanded(vh), scale, traffic)
        (out_t,) = self.heads.to_tokens([tokens_first(out)], [], q.dtype, traffic)
        (lse_t,) = self.heads.to_tokens([lse.permute(2, 0, 1)[..., None]], [], lse.dtype, traffic)
        return out_t.transpose(0, 1).to(q.dtype), lse_t[..., 0].permute(1, 2, 0), (qh, kh, vh, lse)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        kept: tuple[Tensor, ...],
        scale: float,
        wire: torch.dtype,
        traffic: Traffic | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        delta = make_delta(out, dout, lse, dlse)
        (dout_h,) = self._to_heads([dout], [], traffic)
        stats = torch.stack([delta, lse], -1) if not kept else delta[..., None]
        (stats_h,) = self.heads.to_heads([stats.permute(2, 0, 1, 3)], [], traffic)
        stats_h = stats_h.permute(3, 1, 2, 0).contiguous()
        if kept:
            qh, kh, vh, lse_h = kept
        else:
            qh, kh, vh = self._to_heads([q], [k, v], traffic)
            lse_h = stats_h[1]
        dq, dk, dv = run_backward(
            self.inner,
            dout_h,
            qh,
            self._expanded(kh),
            self._expanded(vh),
            stats_h[0],
            lse_h,
            scale,
            wire,
            traffic,
        )
        dk, dv = (self._summed(x, kh.shape[2]) for x in (dk, dv))
        grads = self.heads.to_tokens([tokens_first(dq)], [tokens_first(dk), tokens_first(dv)], wire, traffic)
        return tuple(g.transpose(0, 1).to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))  # type: ignore[return-value]

    def _to_heads(self, by_q: list[Tensor], by_kv: list[Tensor], traffic: Traffic | None) -> list[Tensor]:
        arrived = self.heads.to_heads(
            [x.transpose(0, 1) for x in by_q], [x.transpose(0, 1) for x in by_kv], traffic
        )
        return [x.transpose(0, 1) for x in arrived]

    def _expanded(self, x: Tensor) -> Tensor:
        return x if self.expand is None else x[:, :, self.expand]

    def _summed(self, x: Tensor, kv_heads: int) -> Tensor:
        """Gradients of expanded kv heads, added up in head order."""
        if self.expand is None:
            return x
        total = x.new_zeros((*x.shape[:2], kv_heads, x.shape[3]))
        for place, kv in enumerate(self.expand):
            total[:, :, kv] += x[:, :, place]
        return total


def local_problem(problem: Problem, deal: HeadDeal, member: int) -> Problem:
    """The part of the problem that `member` works on: its heads only."""
    q_heads, kv_heads, index = deal.q_heads[member], deal.kv_heads[member], problem.index
    grouped = deal.grouped[member]
    if index.heads == problem.num_kv_heads and grouped:
        index = index.select_heads(kv_heads) if index.heads > 1 else index
    else:
        index = select_heads(index, q_heads, problem.num_q_heads)
    kv = len(kv_heads) if grouped else len(q_heads)
    verticals = problem.verticals
    if verticals is not None:
        of_kv = verticals.ids.shape[1] == problem.num_kv_heads
        per_query = [head // (problem.group_size if of_kv else 1) for head in q_heads]
        verticals = SelectedTiles(verticals, kv_heads if of_kv and grouped else per_query)
    return replace(problem, index=index, verticals=verticals, num_q_heads=len(q_heads), num_kv_heads=kv)
