"""Tensors in host memory between forward and backward, copied beside the computation.

Copies run on a CUDA stream of their own, from and to pinned buffers that are used again. `HostStore.put`
starts the copy out; the device memory is free for others as soon as it is done. `HostCopy.get` waits, on the
device only, for the copy back, and starts that of the tensor put before it: the backward pass, which asks in
the reverse order, finds each tensor already under way.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor


class CopyEngine(Protocol):
    """Ordered copies beside the current stream."""

    def buffer(self, like: Tensor) -> Tensor:
        """A host tensor of the shape and type."""

    def out(self, host: Tensor, x: Tensor) -> None:
        """Start host = x, after all work that is queued now. `x` may be freed at once."""

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        """Start a device copy of host, after all copies that were started before; (copy, ticket)."""

    def wait(self, x: Tensor, ticket: Any) -> None:
        """Let the current stream use a copy that `back` gave."""


class CudaCopies:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def buffer(self, like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=True)

    def out(self, host: Tensor, x: Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(x, non_blocking=True)
        # The allocator must not hand x's memory out before the copy has read it.
        x.record_stream(self.stream)

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        with torch.cuda.stream(self.stream):
            x = host.to(self.device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self.stream)
        return x, event

    def wait(self, x: Tensor, ticket: Any) -> None:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(ticket)
        x.record_stream(current)


class HostStore:
    """Puts tensors into host memory. Buffers are taken back when a copy is dropped, and used again: their
    next copy is queued behind the last one that read them.
    """

    def __init__(self, engine: CopyEngine) -> None:
        self.engine = engine
        self._free: dict[tuple[Any, ...], list[Tensor]] = {}
        self._last: weakref.ref[HostCopy] | None = None

    def put(self, x: Tensor) -> HostCopy:
        """Start copying x out."""
        free = self._free.get((tuple(x.shape), x.dtype))
        host = free.pop() if free else self.engine.buffer(x)
        self.engine.out(host, x)
        copy = HostCopy(self, host, self._last)
        self._last = weakref.ref(copy)
        return copy

    def take_back(self, host: Tensor) -> None:
        self._free.setdefault((tuple(host.shape), host.dtype), []).append(host)


class HostCopy:
    """A tensor in host memory, or on its way."""

    def __init__(self, store: HostStore, host: Tensor, before: weakref.ref[HostCopy] | None) -> None:
        self._store, self._before = store, before
        self._host: Tensor | None = host
        self._device: tuple[Tensor, Any] | None = None

    def fetch(self) -> None:
        """Start the copy back, if it hasn't been started."""
        if self._device is None and self._host is not None:
            self._device = self._store.engine.back(self._host)

    def get(self) -> Tensor:
        """The tensor on the device, for the current stream; kept until `drop`."""
        assert self._host is not None, "the tensor was dropped"
        self.fetch()
        assert self._device is not None
        before = None if self._before is None else self._before()
        if before is not None:
            before.fetch()
        self._store.engine.wait(*self._device)
        return self._device[0]

    def drop(self) -> None:
        """Free the device copy and give the buffer back."""
        if self._host is not None:
            self._store.take_back(self._host)
        self._host = self._device = None

    def __del__(self) -> None:
        self.drop()
