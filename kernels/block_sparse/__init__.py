"""Attention over selected blocks of keys: the index, and the kernels that follow it."""

from ltrain_kernels.block_sparse.api import (
    attention_backward,
    attention_delta,
    attention_forward,
    block_sparse_attention,
)
from ltrain_kernels.block_sparse.closed import ClosedIndex, dense, sliding_window, strided
from ltrain_kernels.block_sparse.index import BlockIndex, ListIndex
from ltrain_kernels.block_sparse.plan import Lists, Plan, prepare
from ltrain_kernels.errors import ArgumentError

__all__ = [
    "ArgumentError",
    "BlockIndex",
    "ClosedIndex",
    "ListIndex",
    "Lists",
    "Plan",
    "attention_backward",
    "attention_delta",
    "attention_forward",
    "block_sparse_attention",
    "dense",
    "prepare",
    "sliding_window",
    "strided",
]
