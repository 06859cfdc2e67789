"""How long this rank's micro-batches take, each counted from when its group has come together."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from ltrain.parallel.collectives import size_of


class GroupTimes:
    """Marks at the starts of micro-batches and at the end of the last backward; on a GPU they are events on
    the current stream, read when `collect` is called.

    A mark waits for the members of the micro-batch's group (on a GPU the stream does, not the host), so that
    a member's time holds no waiting for another's earlier work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._token = torch.zeros(1, device=device)
        self._marks: list[float | torch.cuda.Event] = []
        self._arrivals: list[float | torch.cuda.Event] = []

    def mark(self, group: dist.ProcessGroup | None) -> None:
        """A micro-batch of `group` starts."""
        self._arrivals.append(self._now())
        if group is not None and size_of(group) > 1:
            dist.all_reduce(self._token, group=group)
        self._marks.append(self._now())

    def stop(self) -> None:
        """The last micro-batch has ended."""
        self._arrivals.append(self._now())

    def collect(self) -> tuple[list[float], float]:
        """Seconds of every micro-batch since the last call, and from the first one's start to the end."""
        marks, arrivals = self._marks, self._arrivals
        self._marks, self._arrivals = [], []
        if len(arrivals) != len(marks) + 1:
            return [], 0.0
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = [_between(start, end) for start, end in zip(marks, arrivals[1:], strict=True)]
        return seconds, _between(marks[0], arrivals[-1])

    def _now(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1e3
    assert not isinstance(end, torch.cuda.Event)
    return end - start
