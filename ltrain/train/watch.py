"""What every rank is doing, so that a hung or dead one can be named by the others."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

log = logging.getLogger("ltrain")

# A thread whose innermost frames are in these files waits for other ranks.
_WAITING = (os.path.join("torch", "distributed"), os.path.join("ltrain", "parallel"))
_FRAMES = 4
_SILENT_BEATS = 3


class RankLost(Exception):
    """A collective operation failed: another rank is gone or hangs. The text says which, where known."""


class Watch:
    """A heartbeat of this rank in the job's store, and the report on all ranks when a collective stalls.

    A thread publishes, every `timeout_s / 20` seconds (0.2 to 5), the step, the phase, how long it has
    lasted, the number of collectives begun, and the line that the main thread is at. When the main thread has
    waited for other ranks in one place for 0.8 of the time-out, or an error asks for it, `report` reads all
    ranks' beats and says which lag; each rank leaves its Python stacks and PyTorch's flight recorder in
    `folder`. `position` returns (step, phase, a number that changes with every phase).
    """

    def __init__(self, folder: Path, timeout_s: float, position: Callable[[], tuple[int, str, int]]) -> None:
        self.folder, self.timeout_s, self.position = folder, timeout_s, position
        self.interval_s = min(5.0, max(0.2, timeout_s / 20))
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._main = threading.main_thread().ident
        self._beat, self._mark, self._since = 0, -1, time.monotonic()
        self._told = -1
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if self._world > 1:
            # A connection of its own: a blocking call on the other one would stop the heart.
            self._store = c10d._get_default_store().clone()
            self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * self.interval_s)
            self._thread = None

    def _run(self) -> None:
        # The first beat at once: a rank that is gone before the second is still known by its process.
        while True:
            try:
                state = self._publish()
                stalled = state["waits"] and state["for_s"] > 0.8 * self.timeout_s
                if stalled and self._told != self._mark:
                    self._told = self._mark
                    log.error("%s", self.report())
            except Exception as error:  # the store goes when the launcher does; this must not end the run
                log.debug("no heartbeat: %s", error)
            if self._ended.wait(self.interval_s):
                return

    def _publish(self) -> dict[str, Any]:
        state = self._state()
        self._store.set(f"ltrain/beat/{self._rank}", json.dumps(state))
        return state

    def _state(self) -> dict[str, Any]:
        step, phase, mark = self.position()
        now = time.monotonic()
        if mark != self._mark:
            self._mark, self._since = mark, now
        self._beat += 1
        place, waits = _place(sys._current_frames().get(self._main or 0))
        return {
            "beat": self._beat,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "step": step,
            "phase": phase,
            "for_s": round(now - self._since, 1),
            "collectives": _collectives(),
            "at": place,
            "waits": waits,
        }

    def explain(self, error: RuntimeError) -> str | None:
        """What a failed collective operation means; None where the error is another one."""
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(name in text for name in ("gloo", "NCCL")):
            return None
        if "timed out" in text.lower() or "timeout" in text.lower():
            return self.report()
        mine, why = self._state(), text.splitlines()[0]
        return f"rank {self._rank} lost another rank: step {mine['step']}, {_doing(mine)}; {why}"

    def report(self) -> str:
        """Which ranks lag and what each does; also writes this rank's stacks and flight record.

        Takes a few beats, to tell a silent rank from a busy one.
        """
        mine = self._state()
        told = f"rank {self._rank} waits for other ranks: step {mine['step']}, {_doing(mine)}"
        if self._world == 1:
            return told
        keys = [f"ltrain/beat/{rank}" for rank in range(self._world)]
        first = self._read(keys)
        time.sleep(_SILENT_BEATS * self.interval_s)
        states = self._read(keys)
        silent = [r for r in first if r != self._rank and states[r]["beat"] == first[r]["beat"]]
        return f"{told}. {laggards(states, silent, self._world)}.{self._dump()}"

    def _read(self, keys: list[str]) -> dict[int, dict[str, Any]]:
        found = {}
        for rank, key in enumerate(keys):
            if self._store.check([key]):
                found[rank] = json.loads(self._store.get(key))
        return found

    def _dump(self) -> str:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank-{self._rank}.stacks.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            record = torch._C._distributed_c10d._dump_fr_trace_json()
            (self.folder / f"rank-{self._rank}.flight.json").write_bytes(record)
        except (OSError, RuntimeError, AttributeError) as error:
            return f" Stacks could not be written: {error}"
        return f" Stacks and the last collectives: {self.folder}"


def _collectives() -> int:
    """Collectives that this rank has begun, over its groups that count them."""
    total = 0
    for group in list(c10d._world.pg_map):
        with contextlib.suppress(RuntimeError):  # groups that this rank is no member of have no count
            total += group._get_sequence_number_for_group()
    return total


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is, as `file:line function` of the innermost frame outside libraries that wait for other
    ranks, and whether it waits.
    """
    waits = False
    for depth in range(64):
        if frame is None:
            break
        name = frame.f_code.co_filename
        ours = name == __file__ or name == contextlib.__file__
        if not ours and not any(part in name for part in _WAITING):
            return f"{Path(name).name}:{frame.f_lineno} {frame.f_code.co_name}", waits
        waits = waits or depth < _FRAMES
        frame = frame.f_back
    return "unknown", waits


def _doing(state: dict[str, Any]) -> str:
    return f"{state['phase']} for {state['for_s']:.0f} s (at {state['at']})"


def laggards(states: dict[int, dict[str, Any]], silent: list[int], world: int) -> str:
    """Who keeps the others waiting, in words, from the last heartbeats by rank.

    First the ranks that are gone: without a beat of this job, or with the same beat as before. Then those
    that don't wait while others do, and those with fewer collectives begun than the rest.
    """
    absent = [rank for rank in range(world) if rank not in states]
    texts = [f"rank {rank} has sent no sign of life" for rank in absent]
    texts += [
        f"rank {rank} (process {states[rank]['pid']} on {states[rank]['host']}) is silent, dead or stopped: "
        f"last seen in step {states[rank]['step']}, {_doing(states[rank])}"
        for rank in silent
    ]
    if not texts:
        most = max(state["collectives"] for state in states.values())
        behind = [rank for rank, state in states.items() if state["collectives"] < most]
        busy = [rank for rank, state in states.items() if not state["waits"]]
        for rank in busy if 0 < len(busy) < len(states) else behind:
            state = states[rank]
            texts.append(
                f"rank {rank} (process {state['pid']} on {state['host']}) lags: step {state['step']}, "
                f"{_doing(state)}, {most - state['collectives']} collectives behind"
            )
    return "; ".join(texts) or "all ranks wait at the same point: look at the link between them"
