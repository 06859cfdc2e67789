"""What the kernels read of a plan: bounds of every line, entries with full blocks first, and the order of
launch.

A *line* is a sparse row (forward, dQ) or a sparse column (dK/dV). Stored lists come from the plan; a
closed-form index over ordered positions needs no lists, only four numbers a line, found by binary search over
block ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ltrain_kernels.block_sparse.closed import ClosedIndex
from ltrain_kernels.block_sparse.plan import Lists, Plan, block_range

# Keys and values of the heads that run together should stay in the second-level cache: 50-60 MB on Hopper, in
# two halves that each keep their own copy of what their side reads.
CACHE_BYTES = 32 << 20
# Programs that run at once: 132 multiprocessors of Hopper, two each.
PROGRAMS = 264


@dataclass(frozen=True)
class Lines:
    """One side of a launch.

    items int32 [B * heads * N, 8]: batch, head, line, four bounds, 0, in the order of launch (longest first);
    entries int32 [nnz], or None for the closed form, whose parameters are `pattern` int32 [h, 4]; all as in
    `triton_tiles`. bounds int32 [b, heads, N, 4] only where an item has several lists (columns of lists per
    query head).
    """

    items: Tensor
    entries: Tensor | None
    pattern: Tensor | None
    bounds: Tensor | None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.items, self.entries, self.pattern, self.bounds) if t is not None)


@dataclass(frozen=True)
class Launch:
    """A plan made ready for tensors of one shape. `per_query_head`: lists differ within a group, so no
    packing.

    Positions and documents int32 [1 or B, T]; documents None where there are none.
    """

    rows: Lines
    columns: Lines
    block_q: int
    block_k: int
    per_query_head: bool
    q_pos: Tensor
    k_pos: Tensor
    q_doc: Tensor | None
    k_doc: Tensor | None
    window: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of both sides; positions and documents belong to the caller."""
        return self.rows.nbytes + self.columns.nbytes


_LAUNCHES: WeakKeyDictionary[Plan, dict[tuple[int, ...], Launch]] = WeakKeyDictionary()


def launch_of(plan: Plan, batch: int, heads: int, kv_heads: int, head_bytes: int) -> Launch:
    """The launch of `plan` for these tensors, made once. `head_bytes`: bytes of a token's key and value, one
    head."""
    made = _LAUNCHES.setdefault(plan, {})
    key = (batch, heads, kv_heads, head_bytes)
    if key not in made:
        made[key] = _make(plan, *key)
    return made[key]


def _make(plan: Plan, batch: int, heads: int, kv_heads: int, head_bytes: int) -> Launch:
    index = plan.index
    group = heads // kv_heads
    per_query_head = index.heads == heads and group > 1
    item_heads = heads if per_query_head else kv_heads
    ends = _block_ends(plan) if isinstance(index, ClosedIndex) and not index.transposed else None
    if ends is not None:
        pattern = index.params.contiguous()
        sides = [(_closed_rows(index, ends), None, pattern), (_closed_columns(index, ends), None, pattern)]
    else:
        sides = [(*_stored(lists), None) for lists in (plan.rows, plan.cols)]
    num_q, num_k = plan.num_tokens
    lines = []
    for column_side, (bounds, entries, params) in enumerate(sides):
        size = (bounds[..., 3] - bounds[..., 0]).expand(batch, item_heads, -1)
        streamed = head_bytes * (num_q * group if column_side else num_k)
        if column_side and per_query_head:
            size = size.reshape(batch, kv_heads, group, -1).sum(2)
        order = _order(size, streamed)
        several = bool(column_side) and per_query_head
        items = _items(size * 0 if several else bounds, size, order)
        lines.append(Lines(items, entries, params, bounds if several else None))
    return Launch(
        *lines, index.block_q, index.block_k, per_query_head,
        plan.q_pos, plan.k_pos, plan.q_doc, plan.k_doc, plan.window,
    )  # fmt: skip


def _stored(lists: Lists) -> tuple[Tensor, Tensor]:
    start, end = lists.ptr[..., :-1], lists.ptr[..., 1:]
    return torch.stack([start, start, lists.mid, end], -1).to(torch.int32), lists.ids


def _items(bounds: Tensor, size: Tensor, order: Tensor) -> Tensor:
    """Rows of `Lines.items`, in this order."""
    batch, heads, lines = size.shape
    place = torch.cartesian_prod(*(torch.arange(n, device=order.device) for n in size.shape)).to(torch.int32)
    four = bounds[..., None].expand(-1, -1, -1, 4) if bounds.dim() == 3 else bounds
    four = four.to(torch.int32).expand(batch, heads, lines, 4).reshape(-1, 4)
    return torch.cat([place, four, torch.zeros_like(place[:, :1])], 1)[order].contiguous()


def _order(size: Tensor, bytes_per_head: int) -> Tensor:
    """Items [B, H, N] ranked for launch: heads in groups whose operands fit the cache, longest lines first in
    a group.

    One group of all heads instead where a single line is long beside an even share of the work, as strided
    columns are: met late, it would keep one multiprocessor busy after all others are done.
    """
    total, lines = size.shape[0] * size.shape[1], size.shape[2]
    fitting = [
        d for d in range(1, total + 1) if total % d == 0 and (d == 1 or d * bytes_per_head <= CACHE_BYTES)
    ]
    together = max(fitting, default=1)
    if size.numel() and int(size.max()) * PROGRAMS * 2 > int(size.sum()):
        together = total
    groups = size.reshape(total // together, together * lines) if total else size.reshape(1, 0)
    rank = torch.argsort(groups, dim=1, descending=True, stable=True)
    rank += torch.arange(len(groups), device=rank.device)[:, None] * (together * lines)
    return rank.flatten()


@dataclass(frozen=True)
class _Ends:
    """Ends of the blocks' keys of order, int64 [b, blocks]: (document, position) joined, and documents
    alone."""

    q: tuple[Tensor, Tensor]
    k: tuple[Tensor, Tensor]
    q_doc: tuple[Tensor, Tensor] | None
    k_doc: tuple[Tensor, Tensor] | None
    num_whole: int
    window: int | None


def _block_ends(plan: Plan) -> _Ends | None:
    """Ends of every block, or None where (document, position) is not in order (then lists are stored)."""
    index = plan.index

    def joined(pos: Tensor, doc: Tensor | None) -> Tensor:
        return pos.long() if doc is None else (doc.long() << 32) + pos

    q, k = joined(plan.q_pos, plan.q_doc), joined(plan.k_pos, plan.k_doc)
    ordered = [(x[:, 1:] >= x[:, :-1]).all() for x in (q, k)]
    if not bool(torch.stack(ordered).all()):
        return None
    docs = (None, None)
    if plan.q_doc is not None and plan.k_doc is not None:
        docs = (block_range(plan.q_doc, index.block_q), block_range(plan.k_doc, index.block_k))
    return _Ends(
        block_range(q, index.block_q), block_range(k, index.block_k), *docs,
        plan.num_tokens[1] // index.block_k, plan.window,
    )  # fmt: skip


def _below(ends: Tensor, values: Tensor, *, equal: bool) -> Tensor:
    """Number of `ends` (ascending along the last dim) below each value, or at most it."""
    batch = max(ends.shape[0], values.shape[0])
    ends, values = ends.expand(batch, -1).contiguous(), values.expand(batch, -1).contiguous()
    return torch.searchsorted(ends, values, right=equal)


def _closed_rows(index: ClosedIndex, ends: _Ends) -> Tensor:
    """Bounds [b, H, R, 4] by rows: columns [a, d) may be visible, [b, c) fully; then counted in entries."""
    q_first, q_last = ends.q
    k_first, k_last = ends.k
    a = torch.zeros_like(q_first)
    b, c, d = (
        a,
        _below(k_last, q_first, equal=True).clamp(max=ends.num_whole),
        _below(k_first, q_last, equal=True),
    )
    if ends.window is not None:
        a = _below(k_last, q_first - ends.window, equal=True)
        b = _below(k_first, q_last - ends.window, equal=True)
    if ends.q_doc is not None and ends.k_doc is not None:
        first, last = ends.q_doc
        a = torch.maximum(a, _below(ends.k_doc[1], first, equal=False))
        b = torch.maximum(b, _below(ends.k_doc[0], first, equal=False))
        c = torch.where(first == last, c, b)
    b = torch.minimum(torch.maximum(b, a), d)
    c = torch.minimum(torch.maximum(c, b), d)
    row = torch.arange(index.num_rows, device=q_first.device)[None, :, None]
    columns = torch.minimum(torch.stack(torch.broadcast_tensors(a, b, c, d), -1), row + 1)[:, None]
    local, sinks, stride, residue = index.params.long()[None, :, None, None, :].unbind(-1)
    low = (row - local + 1).clamp(min=0)
    sinks = torch.minimum(sinks, low)
    step = stride.clamp(min=1)
    start = sinks + torch.remainder(residue - sinks, step)
    strided = torch.div(torch.minimum(columns, low) - start + step - 1, step, rounding_mode="floor").clamp(
        min=0
    )
    count = torch.minimum(columns, sinks) + torch.where(stride > 0, strided, 0) + (columns - low).clamp(min=0)
    return count.to(torch.int32).contiguous()


def _closed_columns(index: ClosedIndex, ends: _Ends) -> Tensor:
    """Bounds [b, H, C, 4] by columns. Column j is seen by rows j, j + 1, ... without a gap, so an entry is
    its row."""
    q_first, q_last = ends.q
    k_first, k_last = ends.k
    a, b = _below(q_last, k_first, equal=False), _below(q_first, k_last, equal=False)
    c = d = torch.full_like(a, index.num_rows)
    if ends.window is not None:
        c = _below(q_last - ends.window, k_first, equal=False)
        d = _below(q_first - ends.window, k_last, equal=False)
    column = torch.arange(index.num_cols, device=a.device)
    uniform = column < ends.num_whole
    if ends.q_doc is not None and ends.k_doc is not None:
        first, last = ends.k_doc
        c = torch.minimum(c, _below(ends.q_doc[1], last, equal=True))
        d = torch.minimum(d, _below(ends.q_doc[0], last, equal=True))
        uniform = uniform & (first == last)
    b = torch.minimum(torch.maximum(b, a), d)
    c = torch.where(uniform, torch.minimum(torch.maximum(c, b), d), b)
    rows = torch.stack(torch.broadcast_tensors(a, b, c, d), -1)[:, None]
    heads = torch.arange(index.heads, device=a.device)[:, None]
    length = index.transpose().n_visible(heads, column[None])[None, :, :, None]
    low = column[None, None, :, None]
    return torch.minimum(torch.maximum(rows, low), low + length).to(torch.int32).contiguous()
