"""One writer a run folder: a lock that ends with its process, and generations that fence off older jobs."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, TextIO

from ltrain.config.base import ConfigError

PATIENCE_S = 15.0


class Writer:
    """The right to write a run folder, held by the main process of one job until it ends, however it ends.

    Raises ConfigError where another process on this machine holds it for longer than `patience_s` (a killed
    predecessor needs a moment). Between machines whose file system doesn't share locks the newest job wins:
    each takes the next generation number, and `check` tells an older one that it has been superseded.
    """

    def __init__(self, folder: Path, patience_s: float = PATIENCE_S) -> None:
        self._path = folder / "writer.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock: TextIO = (folder / ".writer.lock").open("w")
        except OSError as error:
            raise _unwritable(folder, error) from None
        give_up = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < give_up:
                    time.sleep(0.2)
                    continue
                self._lock.close()
                raise ConfigError(
                    "run.name",
                    folder.name,
                    f"is being written by {_describe(_read(self._path))}",
                    "wait for it, stop it, or choose another name",
                ) from None
        self.generation = int(_read(self._path).get("generation", 0)) + 1
        me = {
            "generation": self.generation,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        temporary = folder / f".writer.json.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(me))
            temporary.replace(self._path)
        except OSError as error:
            raise _unwritable(folder, error) from None

    def check(self) -> str | None:
        """Who took over the folder, if anyone did: nothing more may be written then."""
        holder = _read(self._path)
        generation = holder.get("generation", self.generation)
        return None if generation == self.generation else f"the run was taken over by {_describe(holder)}"

    def release(self) -> None:
        self._lock.close()


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        "run.output", str(folder), f"cannot be written: {error.strerror}", "make room, or name another folder"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("generation", 0), int) else {}


def _describe(holder: dict[str, Any]) -> str:
    if "pid" not in holder:
        return "another process"
    job = f", SLURM job {holder['slurm_job']}" if holder.get("slurm_job") else ""
    return f"process {holder['pid']} on {holder.get('host')}{job}, since {holder.get('since')}"
