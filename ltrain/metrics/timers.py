"""Phase timers that never synchronise a device: CUDA events on a GPU, the clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch


@dataclass
class _Open:
    """A phase that has begun and not ended."""

    name: str
    began: float
    start: Any


class Timers:
    """Accumulates seconds by phase between `collect()` calls.

    On a GPU a phase is timed by events on the current stream and read at `collect()`, when the step has ended
    anyway; NVTX ranges carry the metrics' names. The phase that is open now is `current`, for messages about
    hangs, and `changes` counts phases begun and ended, so that a standstill can be seen.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: list[_Open] = []
        self.changes = 0

    @property
    def current(self) -> str:
        return self._open[-1].name if self._open else "between phases"

    @contextmanager
    def phase(self, name: str, *, host: bool = False) -> Iterator[None]:
        """Time a phase. `host` phases (data, checkpoints) are timed by the clock on a GPU too."""
        self.start(name, host=host)
        try:
            yield
        finally:
            self.stop(name)

    def start(self, name: str, *, host: bool = False) -> None:
        """Begin a phase inside the one that is open."""
        start = None
        if self._cuda:
            torch.cuda.nvtx.range_push(f"time/{name}_s")
            if not host:
                start = torch.cuda.Event(enable_timing=True)
                start.record()
        self._open.append(_Open(name, time.perf_counter(), start))
        self.changes += 1

    def stop(self, name: str) -> None:
        """End a phase, and those inside it that an error left open."""
        while self._open:
            phase = self._open.pop()
            self.changes += 1
            if self._cuda:
                torch.cuda.nvtx.range_pop()
            if phase.name == name:
                break
        else:
            raise AssertionError(f"phase {name} was not begun")
        if phase.start is None:
            self.add(name, time.perf_counter() - phase.began)
        else:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self._events.append((name, phase.start, end))

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


class EngineTimers:
    """What mcore calls as `config.timers(name).start()` and `.stop()`: its phases that have a name here are
    timed, the others are not.
    """

    PHASES: ClassVar = {
        "forward-compute": "forward",
        "backward-compute": "backward",
        "all-grads-sync": "grad_sync",
    }

    def __init__(self, timers: Timers) -> None:
        self._timers = timers

    def __call__(self, name: str, log_level: int | None = None) -> _EngineTimer:
        return _EngineTimer(self._timers, self.PHASES.get(name))

    def __deepcopy__(self, memo: Any) -> EngineTimers:
        return self  # mcore copies its configuration; the run has one clock


@dataclass(frozen=True)
class _EngineTimer:
    timers: Timers
    phase: str | None

    def start(self, barrier: bool = False) -> None:
        if self.phase is not None:
            self.timers.start(self.phase)

    def stop(self, barrier: bool = False) -> None:
        if self.phase is not None:
            self.timers.stop(self.phase)
