"""Phase timers that never synchronise a device: CUDA events on a GPU, the clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Timers:
    """Accumulates seconds by phase between `collect()` calls.

    On a GPU a phase is timed by events on the current stream and read at `collect()`, when the step has ended
    anyway; NVTX ranges carry the same names. The phase that is open now is `current`, for messages about
    hangs.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: list[str] = []

    @property
    def current(self) -> str:
        return self._open[-1] if self._open else "between steps"

    @contextmanager
    def phase(self, name: str, *, host: bool = False) -> Iterator[None]:
        """Time a phase. `host` phases (data, checkpoints) are timed by the clock on a GPU too."""
        self._open.append(name)
        use_events = self._cuda and not host
        if self._cuda:
            torch.cuda.nvtx.range_push(name)
        if use_events:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
        began = time.perf_counter()
        try:
            yield
        finally:
            if use_events:
                end.record()
                self._events.append((name, start, end))
            else:
                self.add(name, time.perf_counter() - began)
            if self._cuda:
                torch.cuda.nvtx.range_pop()
            self._open.pop()

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def collect(self) -> dict[str, float]:
        """Seconds by phase since the last call, as `time/NAME_s`."""
        if self._events:
            self._events[-1][2].synchronize()
            for name, start, end in self._events:
                self.add(name, start.elapsed_time(end) / 1e3)
            self._events.clear()
        seconds, self._seconds = self._seconds, {}
        return {f"time/{name}_s": value for name, value in seconds.items()}
