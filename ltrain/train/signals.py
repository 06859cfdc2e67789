"""Stopping on request: signals and deadlines set a flag, all ranks agree on it once a step."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType

import torch
import torch.distributed as dist

EXIT_STOPPED = 75

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# SLURM kills the job at its end; this much time is kept for the last checkpoint.
SLURM_MARGIN_S = 180.0


class StopRequest:
    """Why this process was asked to stop, if it was.

    SIGTERM, SIGUSR1 and SIGINT set the flag only; a second SIGINT within the run ends the process at once.
    Deadlines are `max_minutes` from the start and the end of the SLURM job, less a margin.
    """

    def __init__(self, max_minutes: float | None) -> None:
        self.reason: str | None = None
        self._interrupts = 0
        deadlines = []
        if max_minutes is not None:
            deadlines.append((60 * max_minutes, f"train.max_minutes={max_minutes:g} are over"))
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        if end.isdigit():
            deadlines.append((int(end) - SLURM_MARGIN_S - time.time(), "the SLURM job is about to end"))
        self._deadline = min(deadlines, default=None)
        self._began = time.monotonic()  # the other clock may be set while the job runs
        self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                sys.stderr.write("interrupted twice: leaving without a checkpoint\n")
                os._exit(130)
        self.reason = signal.Signals(number).name

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, device: torch.device) -> str | None:
        """The reason to stop, if any rank has one: collective over the default group."""
        if self.reason is None and self._deadline is not None:
            seconds, reason = self._deadline
            self.reason = reason if time.monotonic() - self._began >= seconds else None
        flag = torch.tensor([0 if self.reason is None else 1], dtype=torch.int32, device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        if not int(flag):
            return None
        return self.reason or "another rank was asked to stop"


def die_with_parent() -> None:
    """Have the kernel kill this process when its launcher dies, so that no orphan trains on (Linux)."""
    if sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() == 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        sys.exit("ltrain: the launcher has died")
