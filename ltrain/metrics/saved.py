"""Counting what autograd saves for a backward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """A context that counts the bytes of the storages saved by operations inside it, each storage once.

    Storages of `excluded` tensors (parameters) don't count. A storage counts whole, however small the view
    of it that is saved: that is what stays allocated. Tensors aren't changed or copied.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        super().__init__(self._pack, lambda x: x)
        self._excluded = {x.untyped_storage().data_ptr() for x in excluded}
        self.storages: dict[int, int] = {}

    def __enter__(self) -> SavedBytes:
        super().__enter__()
        return self

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._excluded:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return x

    @property
    def total(self) -> int:
        return sum(self.storages.values())
