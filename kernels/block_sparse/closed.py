"""Index without stored lists: dense, sliding window, sink + window and strided (S2, LongGen) patterns.

H heads of the index, N blocks of the sequence (rows and columns alike). LongGen is a choice per layer between
these (arXiv 2410.01485); S2 is the strided form with another residue for every head (arXiv 2407.17678,
section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltrain_kernels.block_sparse.index import BlockIndex, ListIndex, _ids, _offsets, check_blocks
from ltrain_kernels.errors import require


class ClosedIndex(BlockIndex):
    """One parametric family for every head, over one sequence in document order with equal blocks:

        selected(h, i, j) = j <= i and (i - j < local[h] or j < sinks[h] or j mod stride[h] == residue[h])

    `local` counts the diagonal block; `local >= N` is dense; stride 0 selects no strided column. `params` is
    int32 [H, 4], columns (local, sinks, stride, residue): all that a kernel needs to walk a row or a column
    by itself. `transposed` swaps the meaning of rows and columns.
    """

    def __init__(self, params: Tensor, num_blocks: int, block: int, *, transposed: bool = False) -> None:
        check_blocks(block, block)
        require(num_blocks >= 0, "num_blocks", num_blocks, "must not be negative")
        require(
            params.dim() == 2 and params.shape[1] == 4, "params.shape", tuple(params.shape), "must be [H, 4]"
        )
        self.params, self.transposed = params.to(torch.int32), transposed
        self.batch, self.heads = 1, params.shape[0]
        self.num_rows = self.num_cols = num_blocks
        self.block_q = self.block_k = block
        self._cache = {}

    def n_visible(self, h: Tensor, i: Tensor) -> Tensor:
        """Length of the list of row `i` of head `h` (broadcast, int64)."""
        h, i = h.to(torch.int64), i.to(torch.int64)
        if self.transposed:
            return self._column_length(h, i)
        _, sinks, strided, low, _ = self._row(h, i)
        return sinks + strided + (i - low + 1)

    def nth(self, h: Tensor, i: Tensor, n: Tensor) -> Tensor:
        """Column of the n-th entry, ascending, of row `i` of head `h` (int64; n < n_visible)."""
        h, i, n = h.to(torch.int64), i.to(torch.int64), n.to(torch.int64)
        if self.transposed:
            return i + n
        first, sinks, strided, low, stride = self._row(h, i)
        after_sinks = n - sinks
        return torch.where(
            n < sinks,
            n,
            torch.where(after_sinks < strided, first + after_sinks * stride, low + (after_sinks - strided)),
        )

    def _row(self, h: Tensor, i: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Sinks 0..sinks-1, then `strided` columns from `first` by `stride`, then the local run low..i."""
        local, sinks, stride, residue = self.params.to(torch.int64)[h].unbind(-1)
        low = (i - local + 1).clamp(min=0)
        sinks = torch.minimum(sinks, low)
        step = stride.clamp(min=1)
        first = sinks + torch.remainder(residue - sinks, step)
        strided = torch.div(low - first + step - 1, step, rounding_mode="floor").clamp(min=0)
        return first, sinks, torch.where(stride > 0, strided, 0), low, step

    def _column_length(self, h: Tensor, j: Tensor) -> Tensor:
        """Column j is seen by rows j, j + 1, ... to the end if a sink or strided, else by `local` rows."""
        local, sinks, stride, residue = self.params.to(torch.int64)[h].unbind(-1)
        forever = (j < sinks) | ((stride > 0) & (torch.remainder(j, stride.clamp(min=1)) == residue))
        rest = self.num_rows - j
        return torch.where(forever, rest, torch.minimum(local, rest))

    @property
    def device(self) -> torch.device:
        return self.params.device

    @property
    def nnz(self) -> int:
        return int(self.counts().sum())

    @property
    def nbytes(self) -> int:
        return self.params.nbytes

    def counts(self) -> Tensor:
        h = torch.arange(self.heads, device=self.device)[:, None]
        return self.n_visible(h, torch.arange(self.num_rows, device=self.device)[None])[None]

    def entries(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = torch.arange(self.num_rows, device=self.device) if rows is None else rows
        h = torch.arange(self.heads, device=self.device)[:, None]
        counts = self.n_visible(h, rows[None])
        ptr = _offsets(counts[None])
        col = [self._head_entries(head, rows, counts[head]) for head in range(self.heads)]
        return ptr, torch.cat(col) if col else torch.empty(0, dtype=torch.int32, device=self.device)

    def _head_entries(self, head: int, rows: Tensor, counts: Tensor) -> Tensor:
        i = torch.repeat_interleave(rows, counts)
        start = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        n = torch.arange(i.numel(), device=self.device) - start
        return self.nth(torch.tensor(head, device=self.device), i, n).to(torch.int32)

    def transpose(self) -> ClosedIndex:
        if "transpose" not in self._cache:
            self._cache["transpose"] = ClosedIndex(
                self.params, self.num_rows, self.block_q, transposed=not self.transposed
            )
        return self._cache["transpose"]

    def to(self, device: torch.device | str) -> ClosedIndex:
        if torch.device(device) == self.device:
            return self
        return ClosedIndex(self.params.to(device), self.num_rows, self.block_q, transposed=self.transposed)

    def select_heads(self, heads: Sequence[int]) -> ClosedIndex:
        picked = _ids("heads", heads, self.heads, self.device)
        return ClosedIndex(self.params[picked], self.num_rows, self.block_q, transposed=self.transposed)

    def drop_future(self) -> ListIndex | ClosedIndex:  # type: ignore[override]
        return super().drop_future() if self.transposed else self


def dense(num_tokens: int, block: int, *, num_heads: int = 1) -> ClosedIndex:
    """Every block up to the diagonal."""
    return sliding_window(
        num_tokens, block, local=max(_num_blocks(num_tokens, block), 1), num_heads=num_heads
    )


def sliding_window(
    num_tokens: int, block: int, *, local: int, sinks: int = 0, num_heads: int = 1
) -> ClosedIndex:
    """The `local` nearest blocks (the diagonal counts), and the first `sinks` blocks of the sequence."""
    return strided(num_tokens, block, local=local, stride=0, residues=[0] * num_heads, sinks=sinks)


def strided(
    num_tokens: int,
    block: int,
    *,
    local: int,
    stride: int,
    residues: Sequence[int],
    sinks: int = 0,
    dense_heads: Sequence[int] = (),
) -> ClosedIndex:
    """S2: the `local` nearest blocks and, in head h, every column j with j mod stride == residues[h].

    One head of the index for every residue; those in `dense_heads` see every block instead. For the published
    pattern residues[h] = -(h * step + offset) mod stride with h the global key/value head; the union over
    heads is the whole context when the residues cover 0..stride-1. Raises ArgumentError on local below 1, a
    negative stride or sink count, or a residue outside 0..stride-1.
    """
    blocks = _num_blocks(num_tokens, block)
    require(local >= 1, "local", local, "must be at least 1: it counts the diagonal block")
    require(stride >= 0, "stride", stride, "must not be negative (0: no strided columns)")
    require(sinks >= 0, "sinks", sinks, "must not be negative")
    for residue in residues:
        require(0 <= residue < max(stride, 1), "residues", residue, f"must lie in 0..{max(stride, 1) - 1}")
    for head in dense_heads:
        require(0 <= head < len(residues), "dense_heads", head, f"must lie in 0..{len(residues) - 1}")
    local, sinks = min(local, max(blocks, 1)), min(sinks, blocks)
    rows = [[local, sinks, stride, residue] for residue in residues]
    for head in dense_heads:
        rows[head] = [max(blocks, 1), 0, 0, 0]
    return ClosedIndex(torch.tensor(rows, dtype=torch.int32).reshape(len(rows), 4), blocks, block)


def _num_blocks(num_tokens: int, block: int) -> int:
    check_blocks(block, block)
    require(num_tokens >= 0, "num_tokens", num_tokens, "must not be negative")
    return -(-num_tokens // block)
