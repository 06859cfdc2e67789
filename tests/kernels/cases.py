"""Inputs for the attention tests: small, odd, and covering every feature of the contract."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ltrain_kernels.block_sparse import BlockIndex


@dataclass(frozen=True)
class Case:
    name: str
    tq: int = 200
    tk: int = 200
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    size: int = 16
    v_size: int = 16
    block_q: int = 32
    block_k: int = 32
    index_heads: int = 2
    index_batch: int = 1
    density: float = 0.5
    docs: tuple[int, ...] = ()
    window: int | None = None
    k_first: int = 0
    empty: tuple[str, ...] = field(default=())

    def make(
        self, dtype: torch.dtype = torch.float64, seed: int = 0
    ) -> tuple[list[Tensor], BlockIndex, dict[str, Any]]:
        """(q, k, v), the index and the keyword arguments of a call."""
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

        q = normal(self.batch, self.tq, self.heads, self.size)
        k = normal(self.batch, self.tk, self.kv_heads, self.size)
        v = normal(self.batch, self.tk, self.kv_heads, self.v_size)
        rows, cols = -(-self.tq // self.block_q), -(-self.tk // self.block_k)
        mask = torch.rand((self.index_batch, self.index_heads, rows, cols), generator=rng) < self.density
        if "rows" in self.empty:
            mask[:, :, 1::3] = False
        if "cols" in self.empty:
            mask[..., ::3] = False
        if "all" in self.empty:
            mask[:] = False
        index = BlockIndex.from_mask(mask, self.block_q, self.block_k)
        options: dict[str, Any] = {
            "q_pos": torch.arange(
                self.tk - self.tq + self.k_first, self.tk + self.k_first, dtype=torch.int32
            ),
            "k_pos": torch.arange(self.tk, dtype=torch.int32),
            "window": self.window,
        }
        if self.docs:
            ends = torch.tensor(self.docs)
            ids = torch.bucketize(torch.arange(self.tk), ends, right=True).to(torch.int32)
            options["k_doc"], options["q_doc"] = ids, ids[-self.tq :] if self.tq else ids[:0]
        return [q, k, v], index, options


CASES = [
    Case("plain"),
    Case("dense", density=1.1),
    Case("ragged_blocks", tq=129, tk=129, block_q=48, block_k=32),
    Case("small_blocks", tq=63, tk=63, block_q=16, block_k=16, heads=2, index_heads=1),
    Case("packed", docs=(50, 51, 130), density=0.8),
    Case("window", window=40, density=1.1),
    Case("window_packed", window=70, docs=(100,), density=0.9, index_heads=4),
    Case("empty_rows", empty=("rows",)),
    Case("empty_columns", empty=("cols",)),
    Case("empty_rows_packed", empty=("rows", "cols"), docs=(90,), index_heads=1),
    Case("nothing_selected", empty=("all",), batch=1),
    Case("fewer_queries", tq=70, tk=200),
    Case("fewer_keys", tq=200, tk=70, k_first=20),
    Case("keys_in_the_future", tq=64, tk=64, k_first=-40),
    Case("v_size", size=24, v_size=40),
    Case("one_kv_head", heads=6, kv_heads=1, index_heads=1),
    Case("index_by_query_head", heads=6, kv_heads=2, index_heads=6),
    Case("index_by_batch", index_batch=2, index_heads=1),
    Case("no_groups", heads=3, kv_heads=3, index_heads=3, batch=1),
    Case("no_queries", tq=0, tk=64, batch=1),
    Case("no_keys", tq=64, tk=0, batch=1),
]


def relative(got: Tensor, want: Tensor) -> float:
    """Relative L2 error, absolute where `want` is zero; infinities must sit at the same places."""
    if not torch.equal(torch.isinf(got), torch.isinf(want)):
        return float("inf")
    got, want = (
        torch.nan_to_num(got.detach().double(), neginf=0.0),
        torch.nan_to_num(want.detach().double(), neginf=0.0),
    )
    return float((got - want).norm() / want.norm().clamp(min=1e-30)) if want.norm() > 0 else float(got.norm())
