"""The key/value cache of one sequence, and attention over it.

Hq query heads, Hkv key/value heads, Hg heads of a group, G query heads of each, n new tokens, S slots, N
blocks, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltrain.generation.rules import Rule, Visible
from ltrain.generation.slots import SlotTable, Write
from ltrain.generation.store import LayerStore

# Entries of a mask that exist at one time.
MASK_ENTRIES = 1 << 24


@dataclass
class _Reading:
    """New tokens on their way through the layers: where they go, and what layers of one rule share."""

    positions: np.ndarray
    search: bool
    writes: dict[int, Write]
    visible: dict[int, Visible]


class SparseCache:
    """Keys and values of one sequence, kept and seen by a rule for each layer.

    `begin`, then `attend` for every layer in turn, then `end`.
    """

    def __init__(self, rules: list[Rule], block: int) -> None:
        self.rules, self.block = rules, block
        self.tables = {id(rule): SlotTable(rule.groups(), block) for rule in rules}
        self.stores = [LayerStore() for _ in rules]
        self.states: list[object] = [None] * len(rules)
        self.length = 0
        self._reading: _Reading | None = None

    def copy(self) -> SparseCache:
        """A cache to go on from while this one stays."""
        made = SparseCache.__new__(SparseCache)
        made.rules, made.block, made.length, made._reading = self.rules, self.block, self.length, None
        made.tables = {key: table.copy() for key, table in self.tables.items()}
        made.stores = [store.copy() for store in self.stores]
        made.states = list(self.states)  # replaced, never changed in place
        return made

    def __deepcopy__(self, memo: object) -> SparseCache:
        return self.copy()

    @property
    def nbytes(self) -> int:
        """Bytes that are held: keys, values, what is kept beside them for the choice, and the tables."""
        kept = sum(store.nbytes for store in self.stores) + sum(t.nbytes for t in self.tables.values())
        return kept + sum(_state_bytes(state) for state in self.states)

    def begin(self, count: int, *, search: bool) -> None:
        """Announce `count` new tokens. `search`: they are a prompt, from which patterns are found anew."""
        positions = np.arange(self.length, self.length + count)
        writes = {}
        if self.length:
            writes = {key: table.extend(count) for key, table in self.tables.items()}
        else:
            for rule in self.rules:
                if not self.tables[id(rule)].length:
                    self.tables[id(rule)].load(count, rule.kept(count))
        self._reading = _Reading(positions, search, writes, {})

    def end(self) -> None:
        """Drop what no later token sees."""
        assert self._reading is not None
        self.length += len(self._reading.positions)
        if self._reading.writes:
            for rule in set(self.rules):
                self.tables[id(rule)].evict(rule.kept(self.length))
        self._reading = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of the new tokens, q [Hq, n, D], k and v [Hkv, n, D] after rotary embedding, over what
        they see; keeps k and v. Returns [n, Hq, D].
        """
        if self.length == 0:
            return self._first(layer, q, k, v, scale)
        return self._later(layer, q, k, v, scale)

    def _first(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rule = self.rules[layer]
        rows = [x.transpose(0, 1)[None].contiguous() for x in (q, k, v)]
        out, self.states[layer] = rule.first(rows[0], rows[1], rows[2], scale)
        self.stores[layer].load(self.tables[id(rule)], k, v)
        return out[0]

    def _later(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        reading, rule, store = self._reading, self.rules[layer], self.stores[layer]
        assert reading is not None
        table = self.tables[id(rule)]
        store.write(table, reading.writes[id(rule)], k, v)
        tokens = q.transpose(0, 1)
        if not rule.shared:
            keys, values = store.whole(table)
            self.states[layer] = rule.resume(self.states[layer], tokens, keys, values, search=reading.search)
        key = id(rule) if rule.shared else layer
        if key not in reading.visible:
            reading.visible[key] = rule.visible(self.states[layer], tokens, reading.positions)
        over = partial(self._over, layer, q, k.shape[0], scale)
        return rule.attend(self.states[layer], tokens, reading.positions, reading.visible[key], over, scale)

    def _over(self, layer: int, q: Tensor, kv_heads: int, scale: float, visible: Visible) -> Tensor:
        """Attention of q [Hq, n, D] over what is kept and visible, [n, Hq, D]."""
        reading, rule, store = self._reading, self.rules[layer], self.stores[layer]
        assert reading is not None
        table = self.tables[id(rule)]
        out = torch.empty_like(q.transpose(0, 1))
        grouped = q.unflatten(0, (kv_heads, -1))
        for g, group in enumerate(table.groups):
            heads = torch.from_numpy(group).to(q.device)
            per_token = len(group) * grouped.shape[1] * table.cols[g].shape[1] * self.block
            step = max(1, MASK_ENTRIES // per_token)
            for start in range(0, q.shape[1], step):
                part = slice(start, start + step)
                found = self._attend_group(
                    grouped[heads, :, part],
                    store.k[g],
                    store.v[g],
                    torch.from_numpy(table.cols[g]).to(q.device),
                    Visible(visible.blocks[heads, :, part], _heads(visible.keys, heads)),
                    torch.from_numpy(reading.positions[part]).to(q.device),
                    rule.window,
                    scale,
                )
                out.unflatten(1, (kv_heads, -1))[part, heads] = found.permute(2, 0, 1, 3)
        return out

    def _attend_group(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cols: Tensor,
        visible: Visible,
        positions: Tensor,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """q [Hg, G, n, D], k and v [Hg, S, block, D], cols [Hg, S] -> [Hg, G, n, D]."""
        heads, group, count, head_dim = q.shape
        blocks, keys = _by_slot(visible, cols)
        wanted = blocks.any(2).any(1)
        if keys is not None:
            wanted |= keys.any(-1).any(1)
        most = int(wanted.sum(-1).max())
        if most < cols.shape[1]:
            # Only the slots that some token sees are read; ties in the sort keep the order of slots.
            slots = wanted.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :most]
            at = torch.arange(heads, device=q.device)[:, None]
            k, v, cols = k[at, slots], v[at, slots], cols[at, slots]
            blocks = blocks.gather(-1, slots[:, None, None].expand(*blocks.shape[:3], -1))
            if keys is not None:
                index = slots[:, None, :, None].expand(-1, keys.shape[1], -1, self.block)
                keys = keys.gather(2, index)
        position = cols[..., None] * self.block + torch.arange(self.block, device=q.device)
        distance = positions[:, None, None] - position[:, None, None]  # [Hg, 1, n, S, block]
        mask = blocks[..., None] if keys is None else blocks[..., None] | keys[:, :, None]
        mask = mask & (distance >= 0) & (cols >= 0)[:, None, None, :, None]
        if window is not None:
            mask = mask & (distance < window)
        mask = mask.expand(-1, group, -1, -1, -1).reshape(heads, 1, group * count, -1)
        rows = q.reshape(heads, 1, group * count, head_dim)
        out = F.scaled_dot_product_attention(
            rows, k.flatten(1, 2)[:, None], v.flatten(1, 2)[:, None], attn_mask=mask, scale=scale
        )
        return out.view(heads, group, count, head_dim)


def _by_slot(visible: Visible, cols: Tensor) -> tuple[Tensor, Tensor | None]:
    """From blocks of the sequence to slots: bool [Hg, 1 or G, n, S], and [Hg, 1 or G, S, block]."""
    at = cols.clamp(min=0)
    blocks = visible.blocks.gather(-1, at[:, None, None].expand(*visible.blocks.shape[:3], -1))
    blocks = blocks & (cols >= 0)[:, None, None]
    if visible.keys is None:
        return blocks, None
    num_blocks = visible.blocks.shape[-1]
    keys = visible.keys.unflatten(-1, (num_blocks, -1))
    index = at[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[-1])
    return blocks, keys.gather(2, index)


def _heads(mask: Tensor | None, heads: Tensor) -> Tensor | None:
    return None if mask is None else mask[heads]


def _state_bytes(state: object) -> int:
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(x.nbytes for x in state if isinstance(x, Tensor)) if isinstance(state, tuple) else 0
