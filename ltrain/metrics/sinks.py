"""Where metrics go: `metrics.jsonl` always, TensorBoard and Weights & Biases where asked for.

A sink that fails warns once and is left out from then on; it never stops training. The JSON lines are the
record that reports are made from.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import secrets
import time
from collections import deque
from pathlib import Path
from typing import Any, Protocol

SCHEMA_VERSION = 1

log = logging.getLogger("ltrain")


class Sink(Protocol):
    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Appends one JSON object a line: `step`, `time` (Unix seconds) and the metrics. Non-finite values are
    null.

    A resumed run cuts lines after the step that it resumes from, so that no step stands twice. What a full
    disk doesn't take is kept, up to `MAX_WAITING` lines, and written when there is room again; a line never
    stands there in part. `time` goes on from the first line of this process by a clock that can't be set.
    """

    MAX_WAITING = 10_000

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self.path = path
        kept = [] if resume_step is None else _lines_until(path, resume_step)
        if path.exists() and resume_step is None:
            # A fresh start in a used folder: keep the older record beside the new one.
            path.rename(path.with_name(f"{path.stem}.{int(time.time() * 1000)}.jsonl"))
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept) or json.dumps({"schema": SCHEMA_VERSION}) + "\n")
        temporary.replace(path)
        self._file = path.open("ab", buffering=0)
        self._waiting: deque[bytes] = deque(maxlen=self.MAX_WAITING)
        self._began = time.time() - time.monotonic()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.append(step, {k: (v if math.isfinite(v) else None) for k, v in metrics.items()})

    def append(self, step: int, values: dict[str, Any]) -> None:
        """Write a record of any JSON values."""
        now = round(self._began + time.monotonic(), 3)
        self._waiting.append((json.dumps({"step": step, "time": now, **values}) + "\n").encode())
        self._flush()

    def _flush(self) -> None:
        end = os.fstat(self._file.fileno()).st_size
        data = b"".join(self._waiting)
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._file.fileno(), end)
            if len(self._waiting) == 1:
                log.warning("%s: %s; lines are kept until there is room", self.path, error.strerror)
        else:
            self._waiting.clear()

    def close(self) -> None:
        if self._waiting:
            self._flush()
        if self._waiting:
            log.warning("%s lacks the last %d lines: the disk is full", self.path, len(self._waiting))
        self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the end of a killed run's file may be cut
        if isinstance(record, dict) and record.get("step", 0) <= step:
            kept.append(line + "\n")
    return kept


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without its schema line and without a cut last line."""
    records = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "step" in record:
            records.append(record)
    return records


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run whose id is kept in the run folder, so that a resumed job continues the same
    run.
    """

    def __init__(
        self, folder: Path, *, mode: str, project: str, name: str, tags: tuple[str, ...], config: Any
    ) -> None:
        import wandb

        self._teardown = wandb.teardown
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        id_file = folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(6))
        self._run = wandb.init(
            id=id_file.read_text().strip(),
            resume="allow" if mode == "online" else None,
            mode=mode,
            project=project,
            name=name,
            tags=list(tags),
            config=config,
            dir=str(folder),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="train/step")
        if mode == "offline":
            log.info(
                "W&B is offline; send the run later with: wandb sync %s", self._run.dir.removesuffix("/files")
            )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        # W&B's own step is the run's, so that the folders of a resumed offline run follow one another.
        self._run.log({"train/step": step, **metrics}, step=step)

    def close(self) -> None:
        self._run.finish()
        # finish() does not wait until W&B's own process has written the end of the file; this does.
        self._teardown()


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in (Path.home() / ".netrc").read_text()
    except OSError:
        return False


class Fanout:
    """Writes to several sinks; one that raises is reported once and dropped."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = list(sinks)

    def add(self, make: Any, what: str) -> None:
        """Add the sink that `make()` builds, or warn that it cannot be had."""
        try:
            self._sinks.append(make())
        except Exception as error:  # a third-party sink may raise anything; the run goes on without it
            log.warning("%s is not available and will not be written: %s", what, error)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for sink in list(self._sinks):
            try:
                sink.write(step, metrics)
            except Exception as error:
                log.warning("%s failed and is left out from now on: %s", type(sink).__name__, error)
                self._sinks.remove(sink)

    def close(self) -> None:
        for sink in self._sinks:
            try:
                sink.close()
            except Exception as error:
                log.warning("%s did not close: %s", type(sink).__name__, error)
