"""Vertical-slash, found online: arXiv 2510.18830 section 3 (training), 2407.02490 section 3 (the pattern).

What differs from the published estimator, and why: everything is fp32 or better; window, sinks and the
diagonal are always kept; the key that crosses the share is included (a sink that alone holds the share no
longer leaves an empty list); keys that a quarter of the watched queries attend with more than 4 /
max_verticals each are verticals by rule and are taken out before slashes are scored, so a vertical is not
mistaken for many slashes; a key that owes over a quarter of its attention to one query counts towards the
share but is left to the slashes; documents have windows and sinks of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ltrain.attention.patterns.base import Capabilities, DynamicPattern, Selection, Shape
from ltrain.attention.patterns.documents import Documents
from ltrain.attention.patterns.exchange import Deal, Gather, Place, Steps
from ltrain.attention.patterns.kinds.sliding_window import local_blocks
from ltrain.attention.patterns.observation import (
    ONE,
    Watched,
    leave_out_kept,
    normaliser,
    slash_sums,
    visible_blocks,
    watch,
    windows_of,
)
from ltrain.attention.patterns.pooling import in_blocks
from ltrain.attention.patterns.rows import diagonal_base, from_diagonals, pack_bits, unpack_bits
from ltrain.attention.patterns.verticals import Verticals
from ltrain.config.patterns import VerticalSlashFields

# A quarter: of the queries that make a key heavy, and of a key's attention that one query may hold.
HEAVY = 4
# fp64 numbers of a watched window that are worked on at a time on a CPU.
CACHED = 1 << 17


class VerticalSlash(VerticalSlashFields, DynamicPattern):
    """Query i of head h attends { j <= i : block diagonal of (i, j) active } and { j <= i : j a vertical of
    h }.

    Head axis Hkv (attention summed over the group) or Hq. `select` gives blocks and verticals apart when
    `verticals="tokens"`; `index` always rounds verticals up to blocks. Four collectives: watched queries,
    their normalisers (two numbers a query), attention sums to the rank that finishes the head, and the bits
    of the result.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(True, True, True, "Hkv, Hq", collectives=4)
    by_distance: ClassVar[bool] = True

    def steps(
        self, q: Tensor, k: Tensor, shape: Shape, place: Place, module: nn.Module | None = None
    ) -> Steps:
        search = _Search(self, shape, place, q.shape[0], q.device)
        rows, owner = search.own_queries(q)
        queries = yield Gather(rows, owner)
        search.score(queries, k)
        partial = yield Gather(search.partial_normalisers(), np.arange(place.world_size))
        sums, owner = search.sums(partial)
        dealt = place.dealt(search.units)
        whole = yield Deal(sums, owner, dealt)
        bits = search.finish(whole, np.flatnonzero(dealt == place.rank))
        bits = yield Gather(bits, dealt)
        return search.selection(bits)


class _Search:
    """The state of one search on one rank. Units are (sequence, head of the selection) pairs, sequence
    slowest.
    """

    def __init__(
        self, rule: VerticalSlash, shape: Shape, place: Place, batch: int, device: torch.device
    ) -> None:
        self.rule, self.shape, self.place, self.batch, self.device = rule, shape, place, batch, device
        self.group = shape.num_heads // shape.num_kv_heads
        self.heads = shape.num_kv_heads if rule.heads == "kv" else shape.num_heads
        self.units = batch * self.heads
        self.windows = windows_of(
            shape.documents, batch, observed=rule.observed, anchors=rule.anchors, dense_below=rule.dense_below
        )
        self.local = local_blocks(rule.window, shape.block)
        self.bins = max(diagonal_base(docs)[1] for docs in shape.documents)
        self.watched: list[list[Watched]] = []

    def docs(self, b: int) -> Documents:
        return self.shape.documents[b if len(self.shape.documents) > 1 else 0]

    def own_queries(self, q: Tensor) -> tuple[Tensor, np.ndarray]:
        """This rank's watched queries [.., Hq, D], in the windows' order, and the owner of every watched
        query.
        """
        own, owners = [q.new_empty(0, *q.shape[2:])], [np.empty(0, np.int64)]
        for window in self.windows:
            owner = self.place.owner_of_tokens(window.rows)
            mine = window.rows[owner == self.place.rank]
            slot = np.searchsorted(self.place.blocks, mine // self.place.block) * self.place.block
            own.append(
                q[window.b].index_select(0, torch.from_numpy(slot + mine % self.place.block).to(q.device))
            )
            owners.append(owner)
        return torch.cat(own), np.concatenate(owners)

    def score(self, queries: Tensor, k: Tensor) -> None:
        """Score all windows against the own keys; holds observed x anchors x T_local x Hq fp32 numbers."""
        keys = in_blocks(k, self.place)
        at = 0
        for window in self.windows:
            docs, size = self.docs(window.b), len(window.rows)
            rows = queries[at : at + size].unflatten(1, (self.shape.num_kv_heads, self.group))
            at += size
            blocks = visible_blocks(window, docs, self.place.blocks)
            self.watched.append(
                [
                    watch(rows[:, head], keys[window.b, :, :, head], window, docs, blocks, self.place.blocks)
                    for head in range(self.shape.num_kv_heads)
                ]
            )

    def partial_normalisers(self) -> Tensor:
        """fp64 [1, 2, watched queries x Hq]: this rank's largest logit and sum of each."""
        parts = [watched.partial_normaliser() for heads in self.watched for watched in heads]
        empty = torch.zeros(0, dtype=torch.float64, device=self.device)
        return torch.stack([torch.cat([empty, *(p[i] for p in parts)]) for i in (0, 1)])[None]

    def sums(self, partial: Tensor) -> tuple[Tensor, np.ndarray]:
        """Rows of `block` integers in fp64 [units, own rows, block], and their owners.

        First the attention on each key, a row a block, times 4 plus 1 for a heavy key or 2 for a passing
        one; then the rank's share of the slash bins, in as many rows as they need. `partial` [ranks, 2,
        ...] are all ranks' partial normalisers.
        """
        block, own = self.shape.block, self.place.blocks
        lse = normaliser(partial[:, 0], partial[:, 1])
        bin_rows = -(-self.bins // block)
        verticals = torch.zeros(self.units, len(own), block, dtype=torch.float64, device=self.device)
        slashes = torch.zeros(self.units, bin_rows * block, dtype=torch.float64, device=self.device)
        for b, doc, members in self._searched():
            base = int(diagonal_base(self.docs(b))[0][doc])
            size = int(self.docs(b).last_block[doc] - self.docs(b).first_block[doc]) + 1
            for head in range(self.shape.num_kv_heads):
                units = self._units(b, head)
                self._document(members, head, lse, verticals[units], slashes[units, base : base + size])
        rows = torch.cat([verticals, slashes.view(self.units, bin_rows, block)], dim=1)
        return rows, np.append(self.place.block_owner, np.repeat(np.arange(self.place.world_size), bin_rows))

    def _document(
        self, members: list[int], head: int, lse: Tensor, verticals: Tensor, slashes: Tensor
    ) -> None:
        """Add one document's attention, from all its windows, for the units of one key/value head."""
        mass = torch.zeros_like(verticals)
        largest, often = mass.clone(), mass.clone()
        bound = HEAVY * self._of_one_query() / self.rule.max_verticals
        for number in members:
            window, watched = self.windows[number], self.watched[number][head]
            step = _chunk(watched)
            for at in range(0, len(watched.blocks), step):
                blocks = watched.blocks[at : at + step]
                p = self._attention(number, head, lse, slice(at, at + step))
                slot = torch.from_numpy(np.searchsorted(self.place.blocks, blocks)).to(p.device)
                by_unit = p.transpose(0, 1)
                best = by_unit.amax(2)
                mass[:, slot] += by_unit.sum(2)
                largest[:, slot] = torch.maximum(largest[:, slot], best)
                above = (best > bound).any(-1).any(0)
                often[:, slot[above]] += (by_unit[:, above] > bound).sum(2)
                slash_sums(p, window, self.docs(window.b), blocks, slashes)
        queries = sum(len(self.windows[number].rows) for number in members)
        heavy = HEAVY * often >= queries
        verticals += 4 * mass + heavy + 2 * ((HEAVY * largest > mass) & ~heavy)
        self._leave_out_of_slashes(heavy, members, head, lse, slashes)

    def _attention(self, number: int, head: int, lse: Tensor, which: slice | Tensor) -> Tensor:
        """A window's attention to some of its blocks, without what is always kept: fp64 integers [n, units,
        M, block].
        """
        window, watched = self.windows[number], self.watched[number][head]
        start, count = self._normaliser_offset(number, head), len(window.rows)
        p = watched.probability(lse[start : start + self.group * count], which)
        p = p.unflatten(1, (self.group, count))
        if self.rule.heads == "kv":
            p = p.sum(1, keepdim=True)
        blocks = watched.blocks[which if isinstance(which, slice) else which.cpu().numpy()]
        leave_out_kept(p, window, self.docs(window.b), blocks, local=self.local, sinks=self.rule.sinks)
        return p

    def _leave_out_of_slashes(
        self, heavy: Tensor, members: list[int], head: int, lse: Tensor, slashes: Tensor
    ) -> None:
        """Take the attention on heavy keys [units, own blocks, block] out of the sums over distances: few
        blocks have any, and integers come out as if they had never been added.
        """
        with_heavy = heavy.any(-1).any(0).nonzero()[:, 0].cpu().numpy()
        for number in members:
            window, watched = self.windows[number], self.watched[number][head]
            found = np.flatnonzero(np.isin(watched.blocks, self.place.blocks[with_heavy]))
            if not len(found):
                continue
            blocks = watched.blocks[found]
            slot = torch.from_numpy(np.searchsorted(self.place.blocks, blocks)).to(heavy.device)
            p = self._attention(number, head, lse, torch.from_numpy(found).to(heavy.device))
            p *= -heavy[:, slot].transpose(0, 1)[:, :, None].double()
            slash_sums(p, window, self.docs(window.b), blocks, slashes)

    def finish(self, whole: Tensor, units: np.ndarray) -> Tensor:
        """Choose for the units dealt to this rank: packed bits uint8 [units, bytes] of verticals, then
        diagonals.
        """
        num_tokens, num_blocks = self.shape.num_tokens, self.docs(0).num_blocks
        bin_rows = -(-self.bins // self.shape.block)
        bits = torch.zeros(len(units), num_tokens + self.bins, dtype=torch.bool, device=self.device)
        verticals = whole[:, :num_blocks].flatten(1)[:, :num_tokens]
        # Partial bins are integers: their sum does not depend on how many ranks they come from.
        slashes = whole[:, num_blocks:].unflatten(1, (self.place.world_size, bin_rows)).sum(1).flatten(1)
        for i, unit in enumerate(units.tolist()):
            b = unit // self.heads
            docs = self.docs(b)
            base, _ = diagonal_base(docs)
            size = docs.last_block - docs.first_block + 1
            diagonals = bits[i, num_tokens:]
            members = {doc: windows for sequence, doc, windows in self._searched() if sequence == b}
            for doc in range(len(docs.starts)):
                here = slice(int(base[doc]), int(base[doc] + size[doc]))
                if doc not in members:
                    diagonals[here] = True
                    continue
                tokens = slice(int(docs.starts[doc]), int(docs.ends[doc]))
                total = self._total(members[doc])
                bits[i, tokens], diagonals[here] = self._choose(verticals[i, tokens], slashes[i, here], total)
        return pack_bits(bits)

    def _choose(self, coded: Tensor, slashes: Tensor, total: float) -> tuple[Tensor, Tensor]:
        """Keys and block diagonals of one document and unit, from sums that leave out what is always kept."""
        rule = self.rule
        verticals = coded.div(4).floor_()
        code = coded - 4 * verticals
        heavy, passing = code == 1, code == 2
        always = total - float(verticals.sum())
        keys = _share(verticals, rule.vertical_p * total - always, rule.max_verticals) & ~passing | heavy
        keys[: rule.sinks] = True
        heavy_mass = float(verticals[heavy].sum())
        bins = _share(slashes, rule.slash_p * total - always - heavy_mass, rule.max_slashes)
        diagonals = bins.clone()
        diagonals[1:] |= bins[:-1]
        diagonals[: self.local] = True
        return keys, diagonals

    def selection(self, bits: Tensor) -> Selection:
        shape, docs = self.shape, self.shape.documents
        flags = unpack_bits(bits, shape.num_tokens + self.bins).unflatten(0, (self.batch, self.heads))
        mask, diagonals = flags[..., : shape.num_tokens], flags[..., shape.num_tokens :]
        index = from_diagonals(list(diagonals), docs, self.batch, self.heads, shape.block)
        found = Selection(index, Verticals(mask.contiguous(), docs))
        return Selection(found.as_index()) if self.rule.verticals == "blocks" else found

    def _searched(self) -> Iterator[tuple[int, int, list[int]]]:
        """(sequence, document, numbers of its windows), in order."""
        grouped: dict[tuple[int, int], list[int]] = {}
        for number, window in enumerate(self.windows):
            grouped.setdefault((window.b, window.doc), []).append(number)
        for (b, doc), members in grouped.items():
            yield b, doc, members

    def _units(self, b: int, head: int) -> slice:
        """The units that one key/value head's attention belongs to."""
        width = 1 if self.rule.heads == "kv" else self.group
        return slice(b * self.heads + head * width, b * self.heads + (head + 1) * width)

    def _normaliser_offset(self, number: int, head: int) -> int:
        before = sum(len(window.rows) for window in self.windows[:number]) * self.shape.num_kv_heads
        return (before + head * len(self.windows[number].rows)) * self.group

    def _total(self, members: list[int]) -> float:
        """All attention of a document's windows, for one unit, in units of 2^-32."""
        return sum(len(self.windows[number].rows) for number in members) * self._of_one_query()

    def _of_one_query(self) -> float:
        return ONE * (self.group if self.rule.heads == "kv" else 1)


def _chunk(watched: Watched) -> int:
    """Blocks at a time: on a CPU so many that their attention stays in the cache."""
    if watched.weight.device.type != "cpu":
        return max(1, len(watched.blocks))
    return max(1, CACHED // (watched.weight.shape[1] * watched.weight.shape[2]))


def _share(mass: Tensor, need: float, limit: int) -> Tensor:
    """The fewest of `mass` (fp64 [n], exact integers) that reach `need`, the crossing one included, at most
    `limit`.
    """
    ranked, order = mass.sort(descending=True, stable=True)
    before = ranked.cumsum(0) - ranked
    taken = (before < need) & (ranked > 0)
    taken[limit:] = False
    kept = torch.zeros_like(taken)
    kept[order] = taken
    return kept
