"""Which blocks of keys each block of queries may see: the one mask representation of every sparse pattern.

B batch, H heads of the index (1, the number of key/value heads or the number of query heads), R query blocks
(rows), C key blocks (columns). A block (i, j) stands for queries i*block_q .. and keys j*block_k ..; the last
block of each side may be short. Nothing of size H x T x T, nor (but for `to_mask`) H x R x C, is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltrain_kernels.errors import ArgumentError, require


class BlockIndex(ABC):
    """A set of selected blocks, by rows: for every (batch, head, row) an ascending list of distinct columns.

    Two forms share this interface: `ListIndex` stores the lists, `ClosedIndex` (closed.py) computes them.
    The index selects blocks only. Causality, documents and windows are decided by the positions given to the
    attention call: a selected block whose keys all lie in the future costs nothing and changes nothing.
    """

    batch: int
    heads: int
    num_rows: int
    num_cols: int
    block_q: int
    block_k: int
    _cache: dict[Any, Any]

    @staticmethod
    def from_mask(mask: Tensor, block_q: int, block_k: int, *, causal: bool = False) -> ListIndex:
        """The index of the true entries of `mask`, bool [B or 1, H, ceil(Tq/block_q), ceil(Tk/block_k)].

        `causal=True` first drops the blocks that lie wholly in the future in document order (query token i is
        token i of the sequence, and so are keys). Raises ArgumentError on another dtype or rank.
        """
        require(mask.dtype == torch.bool, "mask.dtype", mask.dtype, "must be torch.bool")
        require(mask.dim() == 4, "mask.shape", tuple(mask.shape), "must be [batch, heads, rows, columns]")
        ptr = _offsets(mask.sum(-1))
        col = mask.nonzero()[:, 3].to(torch.int32)
        index = ListIndex(ptr, col, mask.shape[3], block_q, block_k)
        return index.drop_future() if causal else index

    @staticmethod
    def from_rows(
        ids: Tensor,
        num_cols: int,
        block_q: int,
        block_k: int,
        *,
        allow_repeats: bool = False,
        causal: bool = False,
    ) -> ListIndex:
        """The index of padded lists: `ids` integer [B or 1, H, rows, K], in any order, -1 where there is no
        entry.

        `allow_repeats=True` keeps one of each repeated id, otherwise repeats are refused; `causal=True` drops
        blocks wholly in the future in document order. Raises ArgumentError on ids outside -1..num_cols-1.
        """
        require(ids.dim() == 4, "ids.shape", tuple(ids.shape), "must be [batch, heads, rows, K]")
        _check_integer("ids", ids)
        require(num_cols >= 0, "num_cols", num_cols, "must not be negative")
        if ids.numel():
            low, high = int(ids.min()), int(ids.max())
            require(low >= -1, "ids", low, "must be block ids, or -1 for no entry")
            require(high < num_cols, "ids", high, f"must be below num_cols={num_cols}")
        # Padding sorts to the end of its row.
        ids = torch.where(ids < 0, num_cols, ids).to(torch.int64).sort(-1).values
        keep = ids < num_cols
        if ids.shape[-1] > 1:
            repeated = keep[..., 1:] & (ids[..., 1:] == ids[..., :-1])
            if not allow_repeats and bool(repeated.any()):
                raise ArgumentError(
                    "ids",
                    int(ids[..., 1:][repeated][0]),
                    "must not be repeated in a row (allow_repeats=True keeps one of each)",
                )
            keep[..., 1:] &= ~repeated
        index = ListIndex(_offsets(keep.sum(-1)), ids[keep].to(torch.int32), num_cols, block_q, block_k)
        return index.drop_future() if causal else index

    @staticmethod
    def from_csr(row_ptr: Tensor, col: Tensor, num_cols: int, block_q: int, block_k: int) -> ListIndex:
        """The index of compressed rows: the columns of row i of head h of batch b are
        `col[row_ptr[b, h, i] : row_ptr[b, h, i + 1]]`, in any order.

        `row_ptr`: integer [B or 1, H, rows + 1], consecutive lists (each head starts where the one before
        ended). Raises ArgumentError on offsets that do not tile `col`, on ids out of range, and on repeats.
        """
        require(
            row_ptr.dim() == 3 and row_ptr.shape[-1] >= 1,
            "row_ptr.shape",
            tuple(row_ptr.shape),
            "must be [batch, heads, rows + 1]",
        )
        require(col.dim() == 1, "col.shape", tuple(col.shape), "must be [nnz]")
        _check_integer("row_ptr", row_ptr)
        _check_integer("col", col)
        ptr = row_ptr.to(torch.int64)
        counts = ptr[..., 1:] - ptr[..., :-1]
        require(not bool((counts < 0).any()), "row_ptr", "a decreasing pair", "must be non-decreasing")
        tiled = bool(torch.equal(_offsets(counts), ptr)) and int(counts.sum()) == col.numel()
        require(tiled, "row_ptr", "offsets", f"must tile col (length {col.numel()}) from 0, head after head")
        if col.numel():
            require(int(col.min()) >= 0, "col", int(col.min()), "must not be negative")
            require(int(col.max()) < num_cols, "col", int(col.max()), f"must be below num_cols={num_cols}")
        key = torch.repeat_interleave(counts.reshape(-1)) * max(num_cols, 1) + col
        key = key.sort().values
        same = key[1:] == key[:-1]
        if bool(same.any()):
            raise ArgumentError("col", int(key[1:][same][0] % num_cols), "must not be repeated in a row")
        return ListIndex(ptr, (key % max(num_cols, 1)).to(torch.int32), num_cols, block_q, block_k)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the lists, or the parameters, live."""

    @property
    @abstractmethod
    def nnz(self) -> int:
        """Selected blocks over all batches and heads of the index."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held by the index itself (a cached transpose counts, plans made from it do not)."""

    @abstractmethod
    def counts(self) -> Tensor:
        """Selected blocks of every row, int64 [batch, heads, rows]."""

    @abstractmethod
    def entries(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compressed lists (ptr int64 [batch, heads, n + 1], col int32 [nnz]) of `rows` (all by default)."""

    @abstractmethod
    def transpose(self) -> BlockIndex:
        """The same set by columns: rows are key blocks, columns query blocks. Made once, then kept."""

    @abstractmethod
    def to(self, device: torch.device | str) -> BlockIndex:
        """This index on `device`; itself if it is there."""

    @abstractmethod
    def select_heads(self, heads: Sequence[int]) -> BlockIndex:
        """The index of these heads, in this order (a tensor-parallel rank's share of the whole)."""

    def to_mask(self) -> Tensor:
        """Bool [batch, heads, rows, columns]. For tests and small sizes: this is the only dense form."""
        ptr, col = self.entries()
        mask = torch.zeros(
            self.batch * self.heads * self.num_rows, self.num_cols, dtype=torch.bool, device=self.device
        )
        row = torch.repeat_interleave((ptr[..., 1:] - ptr[..., :-1]).reshape(-1))
        mask[row, col.to(torch.int64)] = True
        return mask.view(self.batch, self.heads, self.num_rows, self.num_cols)

    def to_lists(self) -> ListIndex:
        """The same set with stored lists."""
        ptr, col = self.entries()
        return ListIndex(ptr, col, self.num_cols, self.block_q, self.block_k)

    def select(self, row_blocks: Tensor | Sequence[int], col_blocks: Tensor | Sequence[int]) -> ListIndex:
        """The sub-rectangle of these query blocks by these key blocks, in this order, as a new index.

        For a shard of queries against a shard of keys: row r of the result is row `row_blocks[r]` of this
        index, column c is column `col_blocks[c]`. Work and memory follow the selected rows' lists. Blocks
        keep their size, so only the last block of each shard may be short. Raises ArgumentError on ids out of
        range or repeated columns.
        """
        rows = _ids("row_blocks", row_blocks, self.num_rows, self.device)
        cols = _ids("col_blocks", col_blocks, self.num_cols, self.device)
        place = torch.full((self.num_cols,), -1, dtype=torch.int64, device=self.device)
        place[cols] = torch.arange(len(cols), device=self.device)
        require(
            int((place >= 0).sum()) == len(cols), "col_blocks", cols.tolist()[:8], "must not repeat a block"
        )
        ptr, col = self.entries(rows)
        new = place[col.to(torch.int64)]
        kept = new >= 0
        list_id = torch.repeat_interleave((ptr[..., 1:] - ptr[..., :-1]).reshape(-1))[kept]
        counts = torch.bincount(list_id, minlength=self.batch * self.heads * len(rows))
        new = new[kept]
        if bool((cols[1:] < cols[:-1]).any()):
            width = max(len(cols), 1)
            new = (list_id * width + new).sort().values % width
        counts = counts.view(self.batch, self.heads, len(rows))
        return ListIndex(_offsets(counts), new.to(torch.int32), len(cols), self.block_q, self.block_k)

    def drop_future(self) -> ListIndex:
        """Without the blocks whose first key comes after the block's last query, in document order."""
        ptr, col = self.entries()
        list_id = torch.repeat_interleave((ptr[..., 1:] - ptr[..., :-1]).reshape(-1))
        row = list_id % max(self.num_rows, 1)
        kept = col.to(torch.int64) * self.block_k <= row * self.block_q + (self.block_q - 1)
        counts = torch.bincount(list_id[kept], minlength=self.batch * self.heads * self.num_rows)
        counts = counts.view(self.batch, self.heads, self.num_rows)
        return ListIndex(_offsets(counts), col[kept], self.num_cols, self.block_q, self.block_k)

    def density(self) -> float:
        """Selected share of the causal blocks (columns up to the diagonal, in document order)."""
        last_query = torch.arange(1, self.num_rows + 1) * self.block_q - 1
        causal = (last_query // self.block_k + 1).clamp(max=self.num_cols).sum()
        return self.nnz / max(self.batch * self.heads * int(causal), 1)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch={self.batch}, heads={self.heads}, rows={self.num_rows}, "
            f"cols={self.num_cols}, block_q={self.block_q}, block_k={self.block_k}, nnz={self.nnz})"
        )


class ListIndex(BlockIndex):
    """Stored lists: `row_ptr` int64 [batch, heads, rows + 1] (absolute offsets) into `col` int32 [nnz].

    The constructor trusts its input (ascending, distinct, in range); use `BlockIndex.from_mask`, `from_rows`
    or `from_csr` for data from elsewhere.
    """

    def __init__(self, row_ptr: Tensor, col: Tensor, num_cols: int, block_q: int, block_k: int) -> None:
        check_blocks(block_q, block_k)
        self.row_ptr, self.col = row_ptr, col
        self.batch, self.heads, self.num_rows = row_ptr.shape[0], row_ptr.shape[1], row_ptr.shape[2] - 1
        self.num_cols, self.block_q, self.block_k = num_cols, block_q, block_k
        self._cache = {}

    @property
    def device(self) -> torch.device:
        return self.col.device

    @property
    def nnz(self) -> int:
        return self.col.numel()

    @property
    def nbytes(self) -> int:
        transposed = self._cache.get("transpose")
        own = self.row_ptr.nbytes + self.col.nbytes
        return own if transposed is None else own + transposed.row_ptr.nbytes + transposed.col.nbytes

    def counts(self) -> Tensor:
        return self.row_ptr[..., 1:] - self.row_ptr[..., :-1]

    def entries(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if rows is None:
            return self.row_ptr, self.col
        start = self.row_ptr[..., :-1].index_select(2, rows)
        counts = self.counts().index_select(2, rows)
        ptr = _offsets(counts)
        flat = counts.reshape(-1)
        # Entry e of list l is col[start_l + e - first_l].
        shift = torch.repeat_interleave((start - ptr[..., :-1]).reshape(-1), flat)
        return ptr, self.col[shift + torch.arange(shift.numel(), device=shift.device)]

    def transpose(self) -> ListIndex:
        if "transpose" not in self._cache:
            counts = self.counts().reshape(-1)
            list_id = torch.repeat_interleave(counts)
            plane = torch.div(list_id, max(self.num_rows, 1), rounding_mode="floor")
            key = plane * self.num_cols + self.col
            order = key.sort(stable=True).indices
            row = (list_id % max(self.num_rows, 1))[order].to(torch.int32)
            sizes = torch.bincount(key, minlength=self.batch * self.heads * self.num_cols)
            ptr = _offsets(sizes.view(self.batch, self.heads, self.num_cols))
            self._cache["transpose"] = ListIndex(ptr, row, self.num_rows, self.block_k, self.block_q)
        return self._cache["transpose"]

    def to(self, device: torch.device | str) -> ListIndex:
        if torch.device(device) == self.device:
            return self
        return ListIndex(
            self.row_ptr.to(device), self.col.to(device), self.num_cols, self.block_q, self.block_k
        )

    def select_heads(self, heads: Sequence[int]) -> ListIndex:
        picked = _ids("heads", heads, self.heads, self.device)
        start, counts = self.row_ptr[:, picked, :-1], self.counts()[:, picked]
        ptr = _offsets(counts)
        shift = torch.repeat_interleave((start - ptr[..., :-1]).reshape(-1), counts.reshape(-1))
        col = self.col[shift + torch.arange(shift.numel(), device=shift.device)]
        return ListIndex(ptr, col, self.num_cols, self.block_q, self.block_k)


def check_blocks(block_q: int, block_k: int) -> None:
    for name, value in (("block_q", block_q), ("block_k", block_k)):
        require(isinstance(value, int) and value >= 1, name, value, "must be a positive integer")


def _offsets(counts: Tensor) -> Tensor:
    """Absolute list offsets [batch, heads, n + 1] of list sizes [batch, heads, n]."""
    batch, heads, n = counts.shape
    ends = counts.reshape(-1).cumsum(0).view(batch, heads, n)
    totals = counts.sum(-1)
    starts = totals.reshape(-1).cumsum(0).view(batch, heads) - totals
    return torch.cat([starts.unsqueeze(-1), ends], dim=-1).to(torch.int64)


def _check_integer(name: str, x: Tensor) -> None:
    require(
        not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool,
        f"{name}.dtype",
        x.dtype,
        "must be an integer type",
    )


def _ids(name: str, ids: Tensor | Sequence[int], bound: int, device: torch.device) -> Tensor:
    ids = torch.as_tensor(ids, dtype=torch.int64, device=device)
    require(ids.dim() == 1, name, tuple(ids.shape), "must be one list of ids")
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        require(low >= 0 and high < bound, name, (low, high), f"must lie in 0..{bound - 1}")
    return ids
