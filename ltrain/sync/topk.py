"""Which entries of a tensor travel: the largest magnitudes of every chunk, chosen the same way everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_SLAB_ENTRIES = 1 << 24


@dataclass(frozen=True)
class Chunking:
    """How a tensor of `shape` is cut into chunks of `chunk` entries, `k` of each travelling.

    `square` cuts a matrix whose sides are multiples of s = sqrt(chunk) into s x s blocks, everything else
    into runs of the flattened tensor (arXiv 2508.15706, section 3; the published code shrinks the blocks of
    other matrices to a divisor of their sides, runs keep every chunk at its full size). The last run may be
    short; it sends min(k, its length) entries.
    """

    shape: tuple[int, ...]
    chunk: int
    k: int
    square: bool = False

    @classmethod
    def of(cls, shape: tuple[int, ...], density: float, chunk: int, square: bool) -> Chunking:
        """The chunking at `density`. Raises ValueError where a value is out of range."""
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density={density} must be in (0, 1]")
        if not 1 <= chunk <= 1 << 16:
            raise ValueError(f"chunk={chunk} must be in 1..65536")
        side = math.isqrt(chunk)
        fits = len(shape) == 2 and side * side == chunk and all(n and n % side == 0 for n in shape)
        return cls(tuple(shape), chunk, max(1, round(density * chunk)), square and fits)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_chunks(self) -> int:
        return -(-self.numel // self.chunk)

    @property
    def num_full(self) -> int:
        return self.numel // self.chunk

    @property
    def tail(self) -> int:
        """Entries of the short last chunk, 0 where there is none."""
        return self.numel % self.chunk

    @property
    def tail_k(self) -> int:
        return min(self.k, self.tail)

    @property
    def num_values(self) -> int:
        return self.num_full * self.k + self.tail_k

    @property
    def dense(self) -> bool:
        """Every entry travels, so no index has to."""
        return self.num_values == self.numel

    def values_per_chunk(self, device: torch.device | str = "cpu") -> Tensor:
        """Number of values of every chunk, int64 [num_chunks]."""
        counts = torch.full((self.num_chunks,), self.k, dtype=torch.int64, device=device)
        if self.tail:
            counts[-1] = self.tail_k
        return counts

    def to_chunks(self, x: Tensor) -> Tensor:
        """`x` flattened in chunk order, [numel]."""
        if not self.square:
            return x.reshape(-1)
        side = math.isqrt(self.chunk)
        rows, columns = (n // side for n in self.shape)
        return x.reshape(rows, side, columns, side).transpose(1, 2).reshape(-1)

    def positions(self, indices: Tensor) -> Tensor:
        """Positions in the flattened tensor of in-chunk `indices` [num_values], int64, in chunk order."""
        if self.dense and not self.square:
            return torch.arange(self.numel, device=indices.device)
        counts = self.values_per_chunk(indices.device)
        chunk = torch.repeat_interleave(torch.arange(len(counts), device=indices.device), counts)
        within = indices.to(torch.int64)
        if not self.square:
            return within.add_(chunk.mul_(self.chunk))
        side = math.isqrt(self.chunk)
        columns = self.shape[1] // side
        row = (chunk // columns) * side + within // side
        return row * self.shape[1] + (chunk % columns) * side + within % side


def select_largest(rows: Tensor, k: int) -> Tensor:
    """In-row indices of the `k` largest magnitudes of every row, ascending, int32 [rows, k].

    Ties go to the lower index, whatever the device or thread count. Raises ValueError on a value that is
    not finite. `rows` is float32 [rows, length] with k <= length.
    """
    num_rows, length = rows.shape
    magnitude = rows.abs()
    top = torch.topk(magnitude, min(k + 1, length), dim=1, sorted=True)
    if not bool(torch.isfinite(top.values[:, 0]).all()):
        raise ValueError("x must be finite: it holds NaN or infinity")
    if k == length:
        return torch.arange(k, dtype=torch.int32, device=rows.device).expand(num_rows, k)
    indices = top.indices[:, :k].to(torch.int32)
    # topk may break a tie at the threshold in any way: redo exactly the rows that have one.
    tied = torch.nonzero(top.values[:, k - 1] == top.values[:, k]).flatten()
    if len(tied):
        threshold = top.values[tied, k - 1 : k]
        magnitude = magnitude[tied]
        above = magnitude > threshold
        equal = magnitude == threshold
        room = k - above.sum(1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(1) <= room))
        indices[tied] = torch.nonzero(chosen)[:, 1].reshape(len(tied), k).to(torch.int32)
    return indices.sort(dim=1).values


def select(flat: Tensor, chunking: Chunking) -> tuple[Tensor, Tensor]:
    """Choose what travels from `flat` (chunk order, float32 [numel]): (indices int32, values), [num_values].

    Raises ValueError on a value that is not finite.
    """
    if chunking.dense:
        if not bool(torch.isfinite(flat).all()):
            raise ValueError("x must be finite: it holds NaN or infinity")
        within = torch.arange(chunking.chunk, dtype=torch.int32, device=flat.device)
        return within.repeat(chunking.num_chunks)[: chunking.numel], flat
    full = flat[: chunking.num_full * chunking.chunk].view(-1, chunking.chunk)
    indices, values = [], []
    # In slabs, so that the magnitudes and the sort never need a second copy of a large tensor.
    for rows in full.split(max(1, _SLAB_ENTRIES // chunking.chunk)):
        index = select_largest(rows, chunking.k)
        indices.append(index.reshape(-1))
        values.append(rows.gather(1, index.to(torch.int64)).reshape(-1))
    if chunking.tail:
        rows = flat[-chunking.tail :].view(1, -1)
        index = select_largest(rows, chunking.tail_k)
        indices.append(index.reshape(-1))
        values.append(rows.gather(1, index.to(torch.int64)).reshape(-1))
    return torch.cat(indices), torch.cat(values)
