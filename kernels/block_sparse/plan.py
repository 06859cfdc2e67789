"""From an index and positions to the lists that a kernel walks: which entries are full, partial or empty.

B batch, H heads of the index, R query blocks, C key blocks. Made once for an (index, positions) pair and
shared by all layers and by forward and backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ltrain_kernels.block_sparse.index import BlockIndex
from ltrain_kernels.errors import require


@dataclass(frozen=True)
class Lists:
    """Lists of one direction: `ids[ptr[b, h, i] : mid[b, h, i]]` are the full entries of row i (every pair of
    tokens is visible, both blocks have all their tokens), `ids[mid[b, h, i] : ptr[b, h, i + 1]]` the partial
    ones; ascending within each part. ptr int64 [B, H, R + 1], mid int64 [B, H, R], ids int32 [nnz].
    """

    ptr: Tensor
    mid: Tensor
    ids: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """An index refined by positions: the visible pairs are those of its entries with k_pos <= q_pos, equal
    documents and, with a window, q_pos - k_pos < window.

    q_pos, q_doc int32 [b, Tq] and k_pos, k_doc int32 [b, Tk] contiguous, b either 1 or `batch`; documents
    None when there are none. `rows` lists key blocks by query block, `cols` query blocks by key block.
    `batch` is 1 when index and positions are the same for the whole batch.
    """

    index: BlockIndex
    q_pos: Tensor
    k_pos: Tensor
    q_doc: Tensor | None
    k_doc: Tensor | None
    window: int | None
    batch: int

    @cached_property
    def rows(self) -> Lists:
        """Made when first asked for: a kernel that walks a closed form never asks."""
        return _classify(self.index, self.q_pos, self.k_pos, self.q_doc, self.k_doc, self.window, self.batch)

    @cached_property
    def cols(self) -> Lists:
        """The transpose of `rows`, with its own full/partial split."""
        batch, heads, num_rows = self.rows.mid.shape
        lists = _list_ids(self.rows.ptr)
        within = torch.arange(lists.numel(), device=lists.device)
        partial = within >= self.rows.mid.reshape(-1)[lists]
        num_cols = self.index.num_cols
        key = (
            torch.div(lists, max(num_rows, 1), rounding_mode="floor") * num_cols + self.rows.ids
        ) * 2 + partial
        row = (lists % max(num_rows, 1)).to(torch.int32)
        # Rows are not ascending in `rows`, where full entries come first, so they are part of the key.
        order = (key * max(num_rows, 1) + row).sort().indices
        return _split(key, row[order], batch, heads, num_cols)

    @property
    def nnz(self) -> int:
        """Entries that are not empty."""
        return self.rows.ids.numel()

    @property
    def num_tokens(self) -> tuple[int, int]:
        return self.q_pos.shape[1], self.k_pos.shape[1]


def prepare(
    index: BlockIndex,
    *,
    q_pos: Tensor,
    k_pos: Tensor,
    q_doc: Tensor | None = None,
    k_doc: Tensor | None = None,
    window: int | None = None,
) -> Plan:
    """The plan of `index` for these positions (int [T] or [B, T]); kept with the index and returned again
    when called with the same tensors, so that every layer of a model shares it.

    Raises ArgumentError where the positions' lengths do not fit the index, or documents are given on one side
    only.
    """
    tensors = (q_pos, k_pos, q_doc, k_doc)
    key = (window, *((id(t), t._version) if t is not None else None for t in tensors))
    plans = index._cache.setdefault("plans", {})
    if key in plans:
        return plans[key][0]
    plan = _prepare(index, q_pos, k_pos, q_doc, k_doc, window)
    while len(plans) >= 4:
        plans.pop(next(iter(plans)))
    # The tensors are kept alive with the entry: an id is unique only as long as its object lives.
    plans[key] = (plan, tensors)
    return plan


def _prepare(
    index: BlockIndex,
    q_pos: Tensor,
    k_pos: Tensor,
    q_doc: Tensor | None,
    k_doc: Tensor | None,
    window: int | None,
) -> Plan:
    require((q_doc is None) == (k_doc is None), "q_doc, k_doc", "one of two", "must be given together")
    require(window is None or window >= 1, "window", window, "must be at least 1, or None")
    device = index.device
    q_pos, k_pos = _tokens("q_pos", q_pos, device), _tokens("k_pos", k_pos, device)
    tq, tk = q_pos.shape[1], k_pos.shape[1]
    if q_doc is not None and k_doc is not None:
        q_doc, k_doc = _tokens("q_doc", q_doc, device), _tokens("k_doc", k_doc, device)
        require(q_doc.shape[1] == tq, "q_doc.shape", tuple(q_doc.shape), f"must have q_pos's {tq} tokens")
        require(k_doc.shape[1] == tk, "k_doc.shape", tuple(k_doc.shape), f"must have k_pos's {tk} tokens")
    for name, blocks, size, tokens in (
        ("index.num_rows", index.num_rows, index.block_q, tq),
        ("index.num_cols", index.num_cols, index.block_k, tk),
    ):
        require(blocks == -(-tokens // size), name, blocks, f"must be ceil({tokens} tokens / {size})")
    sizes = {t.shape[0] for t in (q_pos, k_pos, q_doc, k_doc) if t is not None} | {index.batch}
    require(
        len(sizes - {1}) <= 1, "batch", sorted(sizes), "of index, positions and documents must agree or be 1"
    )
    batch = max(sizes)
    return Plan(index, q_pos, k_pos, q_doc, k_doc, window, batch)


def _classify(
    index: BlockIndex,
    q_pos: Tensor,
    k_pos: Tensor,
    q_doc: Tensor | None,
    k_doc: Tensor | None,
    window: int | None,
    batch: int,
) -> Lists:
    ptr, col = index.entries()
    if index.batch < batch:
        one = ptr[:, :, -1:].max() if ptr.numel() else ptr.new_zeros(())
        ptr = ptr + one * torch.arange(batch, device=ptr.device).view(-1, 1, 1)
        col = col.repeat(batch)
    lists = _list_ids(ptr)
    heads, num_rows, num_cols = index.heads, index.num_rows, index.num_cols
    row = lists % max(num_rows, 1)
    b = torch.div(lists, max(heads * num_rows, 1), rounding_mode="floor")
    j = col.to(torch.int64)

    def stat(x: Tensor, block: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        low, high = block_range(x, block)
        at = (b if x.shape[0] > 1 else 0, ids)
        return low[at], high[at]

    (q_low, q_high), (k_low, k_high) = stat(q_pos, index.block_q, row), stat(k_pos, index.block_k, j)
    empty, full = k_low > q_high, k_high <= q_low
    if q_doc is not None and k_doc is not None:
        (qd_low, qd_high), (kd_low, kd_high) = stat(q_doc, index.block_q, row), stat(k_doc, index.block_k, j)
        empty |= (kd_low > qd_high) | (kd_high < qd_low)
        full &= (qd_low == qd_high) & (kd_low == kd_high) & (qd_low == kd_low)
    if window is not None:
        empty |= q_low - k_high >= window
        full &= q_high - k_low < window
    # A short block is partial, so that kernels with padded tiles mask its tail.
    if q_pos.shape[1] % index.block_q:
        full &= row != num_rows - 1
    if k_pos.shape[1] % index.block_k:
        full &= j != num_cols - 1
    kept = ~empty
    lists, col, partial = lists[kept], col[kept], ~full[kept]
    key = lists * 2 + partial
    order = key.sort(stable=True).indices
    return _split(key, col[order], batch, heads, num_rows)


def _split(key: Tensor, ids: Tensor, batch: int, heads: int, lists: int) -> Lists:
    """Lists of ids already in order, where `key` (any order) is 2 x list + partial of every entry."""
    sizes = torch.bincount(key, minlength=2 * batch * heads * lists)
    ends = sizes.cumsum(0).view(batch, heads, lists, 2)
    start = ends[..., 1] - sizes.view(batch, heads, lists, 2).sum(-1)
    last = ends[..., -1:, 1] if lists else ends.new_zeros(batch, heads, 1)
    return Lists(
        torch.cat([start, last], dim=-1), ends[..., 0].contiguous(), ids.to(torch.int32).contiguous()
    )


def _list_ids(ptr: Tensor) -> Tensor:
    return torch.repeat_interleave((ptr[..., 1:] - ptr[..., :-1]).reshape(-1))


def block_range(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest of every run of `block` tokens, [b, ceil(T / block)] each."""
    batch, tokens = x.shape
    blocks = -(-tokens // block)
    padded = torch.nn.functional.pad(x.to(torch.int64), (0, blocks * block - tokens), mode="constant")
    view = padded.view(batch, blocks, block)
    if blocks * block == tokens or not blocks:
        return view.amin(-1), view.amax(-1)
    # The padding of the last block must not count: repeat its last token.
    view[:, -1, tokens - (blocks - 1) * block :] = x[:, -1:].to(torch.int64)
    return view.amin(-1), view.amax(-1)


def _tokens(name: str, x: Tensor, device: torch.device) -> Tensor:
    require(
        not x.is_floating_point() and x.dtype != torch.bool and not x.is_complex(),
        f"{name}.dtype",
        x.dtype,
        "must be an integer type",
    )
    require(x.dim() in (1, 2), f"{name}.shape", tuple(x.shape), "must be [T] or [B, T]")
    x = x if x.dim() == 2 else x[None]
    return x.to(device=device, dtype=torch.int32).contiguous()


__all__ = ["Lists", "Plan", "prepare"]
