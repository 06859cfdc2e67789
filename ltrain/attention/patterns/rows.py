"""Stored block lists made from ranges, bit rows and block diagonals.

U units (batch x heads of the index, batch slowest), N blocks. A row only ever sees blocks `low[row]`..row
of its sequence (documents.py), so cutting a list to documents is cutting it at `low`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ltrain.attention.patterns.documents import Documents
from ltrain_kernels.block_sparse import BlockIndex, ListIndex


def assemble(counts: Tensor, col: Tensor, num_cols: int, block: int, block_k: int | None = None) -> ListIndex:
    """A ListIndex from list lengths [batch, heads, rows] and the lists themselves, ascending, one after
    another.
    """
    batch, heads, rows = counts.shape
    ends = counts.reshape(-1).cumsum(0).view(batch, heads, rows)
    ptr = (
        torch.cat([ends[..., :1] - counts[..., :1], ends], dim=-1)
        if rows
        else ends.new_zeros(batch, heads, 1)
    )
    return ListIndex(ptr.to(torch.int64), col.to(torch.int32), num_cols, block, block_k or block)


def concatenate(parts: Sequence[BlockIndex]) -> ListIndex:
    """One index of several sequences: parts of batch 1 become its batch."""
    pieces = [part.entries() for part in parts]
    counts = torch.cat([ptr[..., 1:] - ptr[..., :-1] for ptr, _ in pieces])
    first = parts[0]
    return assemble(
        counts, torch.cat([col for _, col in pieces]), first.num_cols, first.block_q, first.block_k
    )


def only_rows(index: BlockIndex, rows: np.ndarray) -> ListIndex:
    """`index` with empty lists in all rows but these, which are ascending and distinct."""
    kept = torch.from_numpy(rows).to(index.device)
    ptr, col = index.entries(kept)
    counts = ptr.new_zeros(index.batch, index.heads, index.num_rows)
    counts[..., kept] = ptr[..., 1:] - ptr[..., :-1]
    return assemble(counts, col, index.num_cols, index.block_q, index.block_k)


def restrict(index: BlockIndex, documents: list[Documents]) -> ListIndex:
    """`index` (batch 1, document order) without the blocks that share no document; one sequence per entry."""
    row = torch.arange(index.num_rows, device=index.device)
    parts = []
    for docs in documents:
        low = torch.from_numpy(docs.low).to(index.device)
        counts, lists = [], []
        for head in range(index.heads):
            ptr, col = index.select_heads([head]).entries()
            of_row = torch.repeat_interleave(row, (ptr[..., 1:] - ptr[..., :-1]).reshape(-1))
            kept = (col >= low[of_row]) & (col <= of_row)
            counts.append(torch.bincount(of_row[kept], minlength=index.num_rows))
            lists.append(col[kept])
        parts.append(assemble(torch.stack(counts)[None], torch.cat(lists), index.num_cols, index.block_q))
    return parts[0] if len(parts) == 1 else concatenate(parts)


def ranges(documents: list[Documents], pieces: Sequence[tuple[np.ndarray, np.ndarray]]) -> ListIndex:
    """Head axis 1; row i of sequence b holds the columns from..to-1 of each piece in turn.

    `pieces` has, for every sequence, two integer arrays [number of pieces, N] (from, to): ascending and
    apart.
    """
    parts = []
    for docs, (start, stop) in zip(documents, pieces, strict=True):
        length = torch.from_numpy(np.maximum(stop - start, 0).T.astype(np.int64))
        first = torch.from_numpy(start.T.astype(np.int64)).reshape(-1)
        flat = length.reshape(-1)
        shift = torch.repeat_interleave(first - (flat.cumsum(0) - flat), flat)
        col = shift + torch.arange(shift.numel())
        parts.append(assemble(length.sum(-1)[None, None], col, docs.num_blocks, docs.block))
    return parts[0] if len(parts) == 1 else concatenate(parts)


def pack_bits(mask: Tensor) -> Tensor:
    """Eight booleans of the last dim to a byte: bool [..., n] -> uint8 [..., ceil(n / 8)]."""
    num_bytes = -(-mask.shape[-1] // 8)
    padded = torch.nn.functional.pad(mask, (0, 8 * num_bytes - mask.shape[-1])).unflatten(-1, (num_bytes, 8))
    weight = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded.to(torch.uint8) * weight).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, length: int) -> Tensor:
    """The inverse of `pack_bits`: bool [..., length]."""
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> bit) & 1).flatten(-2)[..., :length].to(torch.bool)


def from_bits(packed: Tensor, batch: int, heads: int, block: int) -> ListIndex:
    """The index of packed rows: uint8 [N, batch * heads, ceil(N / 8)], bit j of row i is block (i, j)."""
    num_blocks = packed.shape[0]
    counts, lists = [], []
    for unit in range(batch * heads):
        mask = unpack_bits(packed[:, unit], num_blocks)
        counts.append(mask.sum(-1))
        lists.append(mask.nonzero()[:, 1])
    return assemble(torch.stack(counts).view(batch, heads, num_blocks), torch.cat(lists), num_blocks, block)


def from_diagonals(
    active: Sequence[Tensor], documents: list[Documents], batch: int, heads: int, block: int
) -> ListIndex:
    """Block (i, j) of unit u is selected iff low[i] <= j <= i and diagonal i - j is active in i's first
    document.

    active: a list, one entry a sequence of the batch, of bool [heads, diagonals(documents)], see
    `diagonal_base`.
    """
    counts, lists = [], []
    for b in range(batch):
        docs = documents[b if len(documents) > 1 else 0]
        on = active[b]
        base, _ = diagonal_base(docs)
        row = np.arange(docs.num_blocks)
        begin = torch.from_numpy(base[docs.of_first]).to(on.device)
        end = torch.from_numpy(base[docs.of_first] + row - docs.low + 1).to(on.device)
        before = torch.nn.functional.pad(on.cumsum(-1), (1, 0))
        for head in range(heads):
            position = on[head].nonzero()[:, 0]
            count = before[head][end] - before[head][begin]
            # The list of row i is the run of active positions in begin..end-1, farthest diagonal first.
            last = torch.repeat_interleave(before[head][end] - 1, count)
            n = torch.arange(last.numel(), device=on.device) - torch.repeat_interleave(
                count.cumsum(0) - count, count
            )
            high = torch.repeat_interleave(torch.from_numpy(row).to(on.device) + begin, count)
            counts.append(count)
            lists.append(high - position[last - n])
    num_blocks = documents[0].num_blocks
    return assemble(torch.stack(counts).view(batch, heads, num_blocks), torch.cat(lists), num_blocks, block)


def diagonal_base(docs: Documents) -> tuple[np.ndarray, int]:
    """Where each document's block diagonals 0, 1, ... begin in a flat vector, and the length of that
    vector.
    """
    size = docs.last_block - docs.first_block + 1
    return np.append(0, np.cumsum(size)[:-1]).astype(np.int64), int(size.sum())


def with_columns(index: ListIndex, columns: Tensor, documents: list[Documents]) -> ListIndex:
    """`index` and, in every row, its first document's marked blocks: `columns` bool [batch, heads, N]."""
    num_blocks, device = index.num_cols, index.device
    counts, lists = [], []
    for b in range(index.batch):
        docs = documents[b if len(documents) > 1 else 0]
        low = torch.from_numpy(docs.low).to(device)
        row = torch.arange(num_blocks, device=device)
        for head in range(index.heads):
            marked = columns[b, head].nonzero()[:, 0]
            start = torch.searchsorted(marked, low)
            more = torch.searchsorted(marked, row) - start
            shift = torch.repeat_interleave(start - (more.cumsum(0) - more), more)
            extra = marked[shift + torch.arange(shift.numel(), device=device)]
            own_ptr = index.row_ptr[b, head]
            own_row = torch.repeat_interleave(row, own_ptr[1:] - own_ptr[:-1])
            own = own_row * num_blocks + index.col[own_ptr[0] : own_ptr[-1]]
            key = torch.cat([own, torch.repeat_interleave(row, more) * num_blocks + extra]).unique()
            counts.append(torch.bincount(key // max(num_blocks, 1), minlength=num_blocks))
            lists.append(key % max(num_blocks, 1))
    shape = (index.batch, index.heads, num_blocks)
    return assemble(torch.stack(counts).view(shape), torch.cat(lists), num_blocks, index.block_q)
