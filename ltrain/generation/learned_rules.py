"""Rules of the patterns with weights of their own: what a later token chooses by them for itself.

Hq query heads, Hkv key/value heads, G query heads of each, n new tokens, N whole blocks, R whole runs of
compressed tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltrain.attention.patterns.documents import documents_of
from ltrain.attention.patterns.exchange import alone
from ltrain.attention.patterns.kinds.nsa import Nsa, NsaBranches, importance, whole_call
from ltrain.attention.patterns.kinds.seer_gate import BlockGate, block_features
from ltrain.attention.patterns.kinds.sliding_window import local_blocks
from ltrain.attention.patterns.pooling import keep_top_k
from ltrain.generation.rules import BlockTopKRule, Rule, Visible
from ltrain.generation.slots import Columns

# Scores of compressed keys that exist at one time.
SCORES = 1 << 24


class SeerGateRule(BlockTopKRule):
    """As `block_topk`'s, by the gate: kept are the gate's vectors of the whole blocks of keys; a token is a
    block of queries of its own, whose mean, maximum and minimum are the token.
    """

    def _pooled(self, k: Tensor) -> Tensor:
        gate, block = self._gate, self.shape.block
        whole = k.shape[0] // block * block
        features = block_features(
            k[None, :whole], alone(whole, block), documents_of(None, whole, block), keys=True
        )
        return gate.project(features, gate.key)[0].transpose(0, 1)

    def _scores(self, q: Tensor, state: Tensor) -> Tensor:
        gate = self._gate
        mean = q.unflatten(1, (self.shape.num_kv_heads, -1)).float().mean(2)
        asked = gate.project(mean.repeat(1, 1, 3)[:, None], gate.query)[0]
        return torch.einsum("hng,chg->hnc", asked, state)[:, None]

    @property
    def _gate(self) -> BlockGate:
        assert isinstance(self.module, BlockGate)
        return self.module


class Compressed(NamedTuple):
    """Compressed keys and values of the whole runs, [R, Hkv, D] each."""

    keys: Tensor
    values: Tensor


class NsaRule(Rule):
    """All keys are kept, and the compressed keys and values of every whole run. A token computes the three
    branches: it selects its own, the nearest and the first blocks and the best others by its own attention to
    the compressed keys of earlier blocks, `top_k` in all; its window is that of training, in whole blocks.
    """

    shared = False
    pattern: Nsa

    @property
    def _branches(self) -> NsaBranches:
        assert isinstance(self.module, NsaBranches)
        return self.module

    def kept(self, position: int) -> Columns | None:
        return None

    def first(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, object]:
        index = self.select(q, k)[0].index
        call = whole_call(q.shape[1], self.shape.block, window=self.window, scale=scale)
        return self._branches(q, k, v, index, call=call), self._compressed(k[0], v[0])

    def _compressed(self, k: Tensor, v: Tensor) -> Compressed:
        """Of the whole runs of k and v [T, Hkv, D]."""
        module, run = self._branches, self.pattern.compress
        whole = k.shape[0] // run * run
        place, documents = alone(whole, run), documents_of(None, whole, run)
        keys, values = (
            module.compressed(x[None, :whole], weight, place, documents)[0, :, 0]
            for x, weight in ((k, module.key_weight), (v, module.value_weight))
        )
        return Compressed(keys, values)

    def resume(self, state: object, q: Tensor, k: Tensor, v: Tensor, *, search: bool) -> object:
        assert isinstance(state, Compressed)
        done = len(state.keys) * self.pattern.compress
        new = self._compressed(k[done:], v[done:])
        return Compressed(torch.cat([state.keys, new.keys]), torch.cat([state.values, new.values]))

    def visible(self, state: object, q: Tensor, positions: np.ndarray) -> Visible:
        """The selected branch's blocks."""
        assert isinstance(state, Compressed)
        pattern, heads = self.pattern, self.shape.num_kv_heads
        runs = self.shape.block // pattern.compress
        rows = positions // self.shape.block
        mask = torch.zeros(heads, 1, len(rows), int(rows[-1]) + 1, dtype=torch.bool, device=q.device)
        asked = q.float().unflatten(1, (heads, -1)) * q.shape[-1] ** -0.5
        for i, row in enumerate(rows.tolist()):
            keys = state.keys[: row * runs].unflatten(0, (row, runs))
            exists = torch.ones(row, runs, dtype=torch.bool, device=q.device)
            score = importance(asked[i], torch.ones(asked.shape[2], device=q.device), keys, exists)
            nearest = range(max(0, row - pattern.local_blocks + 1), row + 1)
            forced = sorted({*range(min(pattern.sink_blocks, row)), *nearest})
            mask[:, 0, i, : row + 1] = keep_top_k(score, forced, pattern.top_k)
        return Visible(mask)

    def attend(
        self,
        state: object,
        q: Tensor,
        positions: np.ndarray,
        visible: Visible,
        over: Callable[[Visible], Tensor],
        scale: float,
    ) -> Tensor:
        assert isinstance(state, Compressed)
        rows = torch.from_numpy(positions // self.shape.block).to(q.device)
        blocks = torch.arange(visible.blocks.shape[-1], device=q.device)
        near = rows[:, None] - blocks < local_blocks(self.pattern.window, self.shape.block)
        window = Visible(near.expand(self.shape.num_kv_heads, 1, -1, -1))
        far = self._far(state, q, torch.from_numpy(positions).to(q.device), scale)
        return self.pattern.combine(far, over(visible), over(window), self._branches.gates(q[None])[0])

    def _far(self, state: Compressed, q: Tensor, positions: Tensor, scale: float) -> Tensor:
        """The compressed branch of q [n, Hq, D]: runs that end before the token or with it; 0 without any."""
        runs = len(state.keys)
        last = torch.arange(1, runs + 1, device=q.device) * self.pattern.compress - 1
        grouped = q.unflatten(1, (self.shape.num_kv_heads, -1))
        parts = []
        step = max(1, SCORES // max(q.shape[1] * runs, 1))
        for at in range(0, len(q), step):
            distance = positions[at : at + step, None] - last
            seen = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
            logits = torch.einsum("nhgd,rhd->nhgr", grouped[at : at + step], state.keys).float() * scale
            share = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)
            parts.append(torch.einsum("nhgr,rhd->nhgd", share.to(q.dtype), state.values))
        return torch.cat(parts).flatten(1, 2)
