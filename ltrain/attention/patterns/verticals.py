"""Single keys ("verticals") attended beside selected blocks, each pair counted once, forward and backward.

B batch, T tokens, Hq query heads, Hkv key/value heads, Hs heads of the selection (Hkv or Hq), D head size,
N blocks. With blocks A_h(I) of row I and keys V_h, query i of row I(i) attends { j <= i : block(j) in
A_h(I(i)) or j in V_h }. It is run as two calls of the block-sparse kernel whose results are merged: the
blocks, and the gathered rows of the keys in tiles. A tile holds keys of one block only, so a row takes it
exactly when that block isn't selected for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ltrain.attention.patterns.documents import Documents
from ltrain.attention.patterns.rows import with_columns
from ltrain_kernels.block_sparse import BlockIndex, ListIndex, block_sparse_attention
from ltrain_kernels.block_sparse.api import Backend
from ltrain_kernels.lse_merge import merge

if TYPE_CHECKING:
    from ltrain.attention.patterns.base import Selection

# Keys of padding slots lie after every query.
NEVER = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Tiles:
    """Gathered keys in tiles of `tile` slots: `ids` int64 [B, Hs, tiles * tile], -1 in unused slots.

    `index` has batch B * Hs, head axis 1, rows of the sequence's blocks and columns of tiles.
    """

    ids: Tensor
    index: BlockIndex
    tile: int


@dataclass(frozen=True)
class Verticals:
    """Keys per head of the selection: `mask` bool [B, Hs, T], of queries after the key in the key's
    document.
    """

    mask: Tensor
    documents: list[Documents]

    @property
    def counts(self) -> Tensor:
        """Number of keys, int64 [B, Hs]."""
        return self.mask.sum(-1)

    def ids(self, b: int, head: int) -> Tensor:
        """Token ids, ascending and distinct, int64."""
        return self.mask[b, head].nonzero()[:, 0]

    def _docs(self, b: int) -> Documents:
        return self.documents[b if len(self.documents) > 1 else 0]

    def _useful(self, b: int) -> Tensor:
        """The keys that some later block sees: those of the last document of their block, bool [Hs, T].

        Others are seen from their own block alone, and the diagonal is always selected.
        """
        docs = self._docs(b)
        start = torch.from_numpy(docs.key_run[0]).to(self.mask.device).repeat_interleave(docs.block)
        token = torch.arange(docs.num_tokens, device=self.mask.device)
        return self.mask[b] & (token >= start[: docs.num_tokens])

    def as_blocks(self, index: BlockIndex) -> ListIndex:
        """`index` with every vertical rounded up to its whole block."""
        block, num_blocks = index.block_q, index.num_rows
        marks = []
        for b in range(self.mask.shape[0]):
            useful = torch.nn.functional.pad(self._useful(b), (0, num_blocks * block - self.mask.shape[-1]))
            marks.append(useful.view(-1, num_blocks, block).any(-1))
        return with_columns(index.to_lists(), torch.stack(marks), self.documents)

    def tiles(self, index: BlockIndex, tile: int = 16) -> Tiles:
        """The keys in tiles, and which rows take which tile beside the blocks of `index`."""
        batch, heads, _ = self.mask.shape
        block, num_blocks, device = index.block_q, index.num_rows, self.mask.device
        ids, rows = [], []
        blocks = torch.arange(num_blocks, device=device)
        for b in range(batch):
            useful, low = self._useful(b), torch.from_numpy(self._docs(b).low).to(device)
            for head in range(heads):
                token = useful[head].nonzero()[:, 0]
                per_block = torch.bincount(token // block, minlength=num_blocks)
                per_tile = (per_block + tile - 1) // tile
                first_slot = (per_tile.cumsum(0) - per_tile) * tile
                rank = (
                    torch.arange(len(token), device=device)
                    - (per_block.cumsum(0) - per_block)[token // block]
                )
                slots = token.new_full((int(per_tile.sum()) * tile,), -1)
                slots[first_slot[token // block] + rank] = token
                of_tile = torch.repeat_interleave(blocks, per_tile)
                seen = (of_tile[None] < blocks[:, None]) & (of_tile[None] >= low[:, None])
                ids.append(slots)
                rows.append(seen & ~_selected(index, b, head)[:, of_tile])
        width = max((len(slots) for slots in ids), default=0)
        mask = torch.zeros(batch * heads, 1, num_blocks, width // tile, dtype=torch.bool, device=device)
        padded = torch.full((batch * heads, width), -1, dtype=torch.int64, device=device)
        for unit, (slots, seen) in enumerate(zip(ids, rows, strict=True)):
            padded[unit, : len(slots)] = slots
            mask[unit, 0, :, : seen.shape[1]] = seen
        return Tiles(padded.view(batch, heads, width), BlockIndex.from_mask(mask, block, tile), tile)


def _selected(index: BlockIndex, b: int, head: int) -> Tensor:
    """Bool [N, N] of one head of one sequence."""
    ptr, col = index.select_heads([head]).entries()
    own = ptr[b if index.batch > 1 else 0, 0]
    mask = torch.zeros(index.num_rows, index.num_cols, dtype=torch.bool, device=col.device)
    row = torch.repeat_interleave(own[1:] - own[:-1])
    mask[row, col[own[0] : own[-1]].to(torch.int64)] = True
    return mask


def gather_rows(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` [B, Hs, W] of x [B, T, Hkv, D] as [B * Hs, W, 1, D]; differentiable. Unused slots (-1)
    give row 0.
    """
    batch, heads, width = ids.shape
    per_head = (
        x.transpose(1, 2).repeat_interleave(heads // x.shape[2], dim=1)
        if heads > x.shape[2]
        else x.transpose(1, 2)
    )
    picked = per_head.gather(2, ids.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[3]))
    return picked.reshape(batch * heads, width, 1, x.shape[3])


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    *,
    doc_ids: Tensor | None = None,
    tiles: Tiles | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of one process over a selection: (out [B, T, Hq, Dv], lse [B, Hq, T]), exact forward and
    backward.

    q [B, T, Hq, D], k and v [B, T, Hkv, .] in document order, the whole sequence; doc_ids int [T] or [B,
    T]. `tiles` are the selection's verticals in tiles where they were made before (they are a constant of
    the layer). window: a query sees keys less than so many tokens before it.
    """
    position = torch.arange(q.shape[1], dtype=torch.int32, device=q.device)
    near = block_sparse_attention(
        q, k, v, selection.index, q_pos=position, k_pos=position, q_doc=doc_ids, k_doc=doc_ids,
        window=window, scale=scale, backend=backend,
    )  # fmt: skip
    if selection.verticals is None:
        return near
    tiles = tiles or selection.verticals.tiles(selection.index)
    if not tiles.ids.shape[-1]:
        return near
    return merge([near, _vertical_part(q, k, v, tiles, position, doc_ids, window, scale, backend)])


def _vertical_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tiles,
    position: Tensor,
    doc_ids: Tensor | None,
    window: int | None,
    scale: float | None,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    batch, length, num_heads, _ = q.shape
    heads = tiles.ids.shape[1]
    group = num_heads // heads
    # Heads of the selection become batch entries, since every one has keys (and positions) of its own.
    folded = q.unflatten(2, (heads, group)).transpose(1, 2).reshape(batch * heads, length, group, -1)
    ids = tiles.ids.view(batch * heads, -1)
    key_pos = torch.where(ids < 0, NEVER, ids).to(torch.int32)
    query_doc = key_doc = None
    if doc_ids is not None:
        docs = doc_ids.expand(batch, length) if doc_ids.dim() == 1 or len(doc_ids) == 1 else doc_ids
        query_doc = docs.repeat_interleave(heads, dim=0)
        key_doc = query_doc.gather(1, ids.clamp(min=0))
    out, lse = block_sparse_attention(
        folded, gather_rows(k, tiles.ids), gather_rows(v, tiles.ids), tiles.index,
        q_pos=position, k_pos=key_pos, q_doc=query_doc, k_doc=key_doc, window=window, scale=scale,
        backend=backend,
    )  # fmt: skip
    out = out.view(batch, heads, length, group, -1).transpose(1, 2).reshape(batch, length, num_heads, -1)
    return out, lse.view(batch, heads, group, length).reshape(batch, num_heads, length)
