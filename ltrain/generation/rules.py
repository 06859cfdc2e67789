"""What a layer's cache keeps, and what tokens after the first read attend: one rule a pattern.

The first read of a sequence runs the pattern as training does, over all its tokens. Every later token follows
the layer's rule, which is causal: it never changes what earlier tokens computed.

Hkv key/value heads, G query heads of each, Hs heads of the selection (Hkv or Hq), n new tokens, N blocks so
far, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ltrain.attention.patterns import Pattern, Selection, selected_attention
from ltrain.attention.patterns.kinds.block_topk import BlockTopK
from ltrain.attention.patterns.kinds.sliding_window import local_blocks
from ltrain.attention.patterns.kinds.vertical_slash import VerticalSlash
from ltrain.attention.patterns.pooling import keep_top_k
from ltrain.generation.slots import PROBE_ROW, Columns, head_groups


@dataclass(frozen=True)
class Shape:
    """The model's attention: heads, layers, and the tokens of a block."""

    num_heads: int
    num_kv_heads: int
    num_layers: int
    block: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


class Visible(NamedTuple):
    """What new tokens see beside causality and the model's own window: whole blocks, bool [Hkv, 1 or G, n,
    N], and single keys, bool [Hkv, 1 or G, N * block], or None.
    """

    blocks: Tensor
    keys: Tensor | None = None


class Rule:
    """A dense layer: everything is kept and seen. Rules without state of a sequence are stateless values.

    `window`, the model's own, drops from a static layer's cache what no later query sees. `module` holds the
    pattern's own weights of the layer.
    """

    shared = True
    """Whether what is visible depends on positions alone, hence is the same in all layers of the rule."""

    def __init__(
        self,
        pattern: Pattern,
        layer: int,
        shape: Shape,
        window: int | None,
        module: nn.Module | None = None,
    ) -> None:
        self.pattern, self.layer, self.shape, self.window = pattern, layer, shape, window
        self.module = module

    def groups(self) -> list[np.ndarray]:
        """Key/value heads that are stored together."""
        return [np.arange(self.shape.num_kv_heads)]

    def kept(self, position: int) -> Columns | None:
        """The blocks that the token at `position` or a later one sees, for each head; None: all."""
        if self.window is None:
            return None
        row = position // self.shape.block
        return self._in_window([np.arange(row + 1)] * self.shape.num_kv_heads, position)

    def _in_window(self, columns: Columns, position: int) -> Columns:
        if self.window is None:
            return columns
        oldest = position - self.window + 1
        return [c[(c + 1) * self.shape.block > oldest] for c in columns]

    def first(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, object]:
        """A first read, q [1, T, Hq, D], k and v [1, T, Hkv, D]: its attention [1, T, Hq, D] as training
        computes it, and the state to go on from.
        """
        selection, state = self.select(q, k)
        return selected_attention(q, k, v, selection, window=self.window, scale=scale)[0], state

    def select(self, q: Tensor, k: Tensor) -> tuple[Selection, object]:
        """The selection of a first read and the state to go on from."""
        found = self.pattern.select(**self._arguments(k.shape[1]), q=q, k=k, module=self.module)
        return found, None

    def _arguments(self, num_tokens: int) -> dict[str, int]:
        shape = self.shape
        return {
            "num_tokens": num_tokens,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "block": shape.block,
            "layer": self.layer,
            "num_layers": shape.num_layers,
        }

    def resume(self, state: object, q: Tensor, k: Tensor, v: Tensor, *, search: bool) -> object:
        """The state before new tokens q [n, Hq, D] attend; k and v [T, Hkv, D] are those of all tokens,
        theirs included.

        `search`: these tokens are a prompt, from which a pattern is found anew; others are decoded.
        """
        return state

    def attend(
        self,
        state: object,
        q: Tensor,
        positions: np.ndarray,
        visible: Visible,
        over: Callable[[Visible], Tensor],
        scale: float,
    ) -> Tensor:
        """Attention of tokens q [n, Hq, D] that see `visible`; `over` attends what is kept of it."""
        return over(visible)

    def visible(self, state: object, q: Tensor, positions: np.ndarray) -> Visible:
        """What the tokens q [n, Hq, D] at `positions` [n] see."""
        num_blocks = int(positions[-1]) // self.shape.block + 1
        blocks = torch.ones(self.shape.num_kv_heads, 1, len(positions), num_blocks, dtype=torch.bool)
        return Visible(blocks.to(q.device))


class StaticRule(Rule):
    """The pattern's own row: of a block that a row has dropped no later row sees anything."""

    def __init__(
        self,
        pattern: Pattern,
        layer: int,
        shape: Shape,
        window: int | None,
        module: nn.Module | None = None,
    ) -> None:
        super().__init__(pattern, layer, shape, window, module)
        self._row: tuple[int, Columns] | None = None

    def columns(self, row: int) -> Columns:
        """The blocks that row `row` of the pattern selects, for each key/value head."""
        if self._row is None or self._row[0] != row:
            index = self.pattern.index(**self._arguments((row + 1) * self.shape.block))
            ptr, col = index.entries(torch.tensor([row]))
            bounds, col_np = ptr[0].numpy(), col.numpy().astype(np.int64)
            lists = [col_np[start:stop] for start, stop in bounds]
            lists = lists * self.shape.num_kv_heads if len(lists) == 1 else lists
            self._row = (row, [c[c <= row] for c in lists])
        return self._row[1]

    def groups(self) -> list[np.ndarray]:
        return head_groups(self.columns(PROBE_ROW))

    def kept(self, position: int) -> Columns | None:
        return self._in_window(self.columns(position // self.shape.block), position)

    def visible(self, state: object, q: Tensor, positions: np.ndarray) -> Visible:
        rows = positions // self.shape.block
        mask = np.zeros((self.shape.num_kv_heads, 1, len(rows), int(rows[-1]) + 1), dtype=bool)
        for row in np.unique(rows):
            at = np.flatnonzero(rows == row)
            for head, columns in enumerate(self.columns(int(row))):
                mask[head, 0, at[:, None], columns[None]] = True
        return Visible(torch.from_numpy(mask).to(q.device))


class Searched(NamedTuple):
    """What `vertical_slash` found: active block diagonals, bool [Hs, N], and keys, bool [Hs, T]."""

    diagonals: Tensor
    keys: Tensor


class VerticalSlashRule(Rule):
    """All keys are kept. A prompt's last queries choose verticals and slashes, decoded tokens go on with
    them: the block diagonals of the same distances, the window, and the same single keys.

    A context of up to `dense_below` tokens is seen whole until the next prompt.
    """

    shared = False
    pattern: VerticalSlash

    def kept(self, position: int) -> Columns | None:
        return None

    def select(self, q: Tensor, k: Tensor) -> tuple[Selection, object]:
        apart, state = self._search(self.pattern, q, k)
        if self.pattern.verticals == "blocks":
            return Selection(apart.as_index()), state
        return apart, state

    def _search(self, pattern: VerticalSlash, q: Tensor, k: Tensor) -> tuple[Selection, Searched | None]:
        apart = pattern.model_copy(update={"verticals": "tokens"})
        found = apart.select(**self._arguments(k.shape[1]), q=q, k=k)
        if found.verticals is None or k.shape[1] <= pattern.dense_below:
            return found, None
        last = found.index.num_rows - 1
        diagonals = torch.zeros(found.index.heads, last + 1, dtype=torch.bool, device=k.device)
        ptr, col = found.index.entries(torch.tensor([last], device=k.device))
        for head, (start, stop) in enumerate(ptr[0].tolist()):
            diagonals[head, last - col[start:stop].long()] = True
        return found, Searched(diagonals, found.verticals.mask[0])

    def resume(self, state: object, q: Tensor, k: Tensor, v: Tensor, *, search: bool) -> object:
        if not search:
            return state
        # Only the prompt's queries are watched, so those before them may be anything.
        queries = q.new_zeros(1, k.shape[0], *q.shape[1:])
        queries[0, -len(q) :] = q
        watched = min(self.pattern.observed, len(q))
        pattern = self.pattern.model_copy(update={"observed": watched, "anchors": 1})
        return self._search(pattern, queries, k[None])[1]

    def visible(self, state: object, q: Tensor, positions: np.ndarray) -> Visible:
        whole = super().visible(None, q, positions).blocks
        if state is None:
            return Visible(whole)
        assert isinstance(state, Searched)
        num_blocks, block = whole.shape[-1], self.shape.block
        row = torch.from_numpy(positions // block).to(q.device)[:, None]
        distance = (row - torch.arange(num_blocks, device=q.device)).clamp(min=0)
        known = torch.nn.functional.pad(state.diagonals, (0, max(0, num_blocks - state.diagonals.shape[1])))
        blocks = known[:, distance] | (distance < local_blocks(self.pattern.window, block))
        keys = torch.nn.functional.pad(state.keys, (0, num_blocks * block - state.keys.shape[1]))
        if self.pattern.verticals == "blocks":
            blocks = blocks | keys.unflatten(-1, (num_blocks, block)).any(-1)[:, None]
            return Visible(self._by_head(blocks))
        return Visible(self._by_head(blocks), self._by_head(keys))

    def _by_head(self, mask: Tensor) -> Tensor:
        """[Hs, ...] as [Hkv, 1 or G, ...]."""
        return mask.unflatten(0, (self.shape.num_kv_heads, -1))


class BlockTopKRule(Rule):
    """All keys are kept, and the mean key of every whole block. A token takes its own block, the sink blocks
    and the best others by its own gate, `top_k` in all (MoBA's gate, arXiv 2502.13189, section 2.2).
    """

    shared = False
    pattern: BlockTopK

    def kept(self, position: int) -> Columns | None:
        return None

    def select(self, q: Tensor, k: Tensor) -> tuple[Selection, object]:
        return super().select(q, k)[0], self._pooled(k[0])

    def _pooled(self, k: Tensor) -> Tensor:
        """What is kept [N, Hkv, P] of the whole blocks of keys [T, Hkv, D]: mean keys, fp32."""
        block = self.shape.block
        whole = k.shape[0] // block
        return k[: whole * block].unflatten(0, (whole, block)).float().mean(1)

    def _scores(self, q: Tensor, state: Tensor) -> Tensor:
        """Scores [Hkv, 1 or G, n, N] of the blocks for every token."""
        grouped = q.unflatten(1, (self.shape.num_kv_heads, -1)).float()
        if self.pattern.heads == "kv":
            grouped = grouped.sum(2, keepdim=True)
        return torch.einsum("nhgd,chd->hgnc", grouped, state)

    def resume(self, state: object, q: Tensor, k: Tensor, v: Tensor, *, search: bool) -> object:
        assert isinstance(state, Tensor)
        return torch.cat([state, self._pooled(k[len(state) * self.shape.block :])])

    def visible(self, state: object, q: Tensor, positions: np.ndarray) -> Visible:
        assert isinstance(state, Tensor)
        num_blocks = int(positions[-1]) // self.shape.block + 1
        scores = self._scores(q, state)
        scores = torch.nn.functional.pad(scores, (0, num_blocks - scores.shape[-1]))
        mask = torch.zeros(scores.shape, dtype=torch.bool, device=q.device)
        for i, row in enumerate((positions // self.shape.block).tolist()):
            forced = sorted({*range(min(self.pattern.sink_blocks, row)), row})
            mask[:, :, i, : row + 1] = keep_top_k(scores[:, :, i, : row + 1], forced, self.pattern.top_k)
        return Visible(mask)


class DenseAfterRule(Rule):
    """A pattern that chooses blocks of queries only (`xattention`): sparse in the first read, dense after."""

    def kept(self, position: int) -> Columns | None:
        return None
