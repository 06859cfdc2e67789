"""Counting what autograd saves for a backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor


class _Saved:
    """A tensor that a graph holds; it goes with the graph."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """A context that counts the bytes of the storages saved by operations inside it, each storage once.

    Storages of `excluded` tensors (parameters) don't count, nor does what was saved for a gradient that has
    been taken already. A storage counts whole, however small the view of it that is saved: that is what stays
    allocated. Tensors aren't changed or copied.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        super().__init__(self._pack, lambda saved: saved.x)
        self._excluded = {x.untyped_storage().data_ptr() for x in excluded}
        self._saved: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    def _pack(self, x: Tensor) -> _Saved:
        saved = _Saved(x)
        self._saved.add(saved)
        return saved

    @property
    def total(self) -> int:
        """Of what is saved now."""
        storages = {x.data_ptr(): x.nbytes() for x in (saved.x.untyped_storage() for saved in self._saved)}
        return sum(size for at, size in storages.items() if at not in self._excluded)
