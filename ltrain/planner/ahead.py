"""Plans for the next steps, made in another process while this one trains."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ltrain.planner.baselines import greedy_plan
from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.cost import CostModel
from ltrain.planner.plan import Plan
from ltrain.planner.worker import read_frame, write_frame

_LOG = logging.getLogger(__name__)


class PlanAhead:
    """A planning process with a queue of steps.

    `submit` returns at once; `take` gives the step's plan, and waits at most `timeout_s` for it. A plan that
    is late, or whose process died, is replaced by the greedy plan of the same batch, with a note in the plan
    and a warning in the log; a dead process is started again, `max_restarts` times in all. Input errors are
    raised by `take` as they are by `plan_batch`.

    One rank plans and broadcasts: a plan made under a time limit need not be equal on two machines.
    """

    def __init__(
        self,
        cluster: ClusterSpec,
        cost: CostModel,
        *,
        timeout_s: float = 30.0,
        max_restarts: int = 3,
        **options: Any,
    ) -> None:
        self._cluster, self._cost, self._options = cluster, cost, options
        self._timeout_s, self._restarts_left = timeout_s, max_restarts
        self._lengths: dict[int, tuple[int, ...]] = {}
        self._costs: dict[int, CostModel] = {}
        self._replies: dict[int, tuple[str | None, float, str | None]] = {}
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self.waited_s = 0.0
        """Seconds that `take` has waited in all."""
        self._start()

    def set_cost(self, cost: CostModel) -> None:
        """Plan steps submitted from now on with another cost model."""
        self._cost = cost

    def submit(self, step: int, lengths: Sequence[int]) -> None:
        """Ask for the plan of a step. Raises ValueError where the step was asked for and not yet taken."""
        if step in self._lengths:
            raise ValueError(f"step {step} was submitted already")
        self._lengths[step] = tuple(int(length) for length in lengths)
        self._costs[step] = self._cost
        if self._process is None and self._restarts_left > 0 and not self._closed:
            self._restart()
        else:
            self._send(step)

    def discard(self, step: int) -> None:
        """Forget a submitted step. Raises KeyError where it was not submitted."""
        with self._changed:
            del self._lengths[step], self._costs[step]
            self._replies.pop(step, None)

    def take(self, step: int) -> Plan:
        """The plan of a submitted step. Raises KeyError where it was not submitted, ConfigError on bad
        lengths."""
        lengths, cost = self._lengths[step], self._costs[step]
        began = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: step in self._replies or self._process is None, self._timeout_s)
            reply = self._replies.pop(step, None)
            died = self._process is None
            # From here on a late reply is dropped by the reader.
            del self._lengths[step], self._costs[step]
        self.waited_s += time.monotonic() - began
        if reply is not None and reply[0] is not None:
            return replace(Plan.from_json(reply[0]), solve_s=reply[1])
        if reply is not None:
            reason = f"planning failed ({reply[2]})"
        elif died:
            reason = "the planning process died"
        else:
            reason = f"no plan within {self._timeout_s:g} s"
        plan = greedy_plan(
            lengths,
            self._cluster,
            cost,
            degrees=self._options.get("degrees", "powers_of_two"),
            block=self._options.get("block", 1),
        )
        note = f"step {step}: {reason}; greedy plan"
        _LOG.warning(note)
        self._restart()
        return replace(plan, notes=(*plan.notes, note))

    def close(self) -> None:
        """End the process. Further calls raise."""
        self._closed = True
        process = self._process
        if process is not None:
            with contextlib.suppress(OSError):
                if process.stdin:
                    process.stdin.close()
            process.kill()
            process.wait()

    def __enter__(self) -> PlanAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ltrain.planner.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def _restart(self) -> None:
        if self._closed or self._process is not None or self._restarts_left == 0:
            return
        self._restarts_left -= 1
        self._start()
        for step in list(self._lengths):
            if step not in self._replies:
                self._send(step)

    def _send(self, step: int) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        request = (step, self._lengths[step], self._cluster, self._costs[step], self._options)
        # A process that has just died is noticed by the reader; `take` then plans greedily.
        with contextlib.suppress(BrokenPipeError):
            write_frame(process.stdin, request)  # type: ignore[arg-type]

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        try:
            while True:
                step, text, solve_s, error = read_frame(process.stdout)  # type: ignore[arg-type]
                with self._changed:
                    if step in self._lengths:
                        self._replies[step] = (text, solve_s, error)
                    self._changed.notify_all()
        except (EOFError, OSError, ValueError):
            with self._changed:
                if self._process is process:
                    self._process = None
                self._changed.notify_all()
            process.wait()
