"""Saving and restoring over all ranks: in the background, agreed by vote, newest whole one first."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ltrain.train.checkpoint import folder as files
from ltrain.train.checkpoint.folder import CheckpointError
from ltrain.train.checkpoint.pieces import Piece, tensor_key
from ltrain.train.checkpoint.reading import CheckpointReader, index_entry

log = logging.getLogger("ltrain")


@dataclass
class Snapshot:
    """Everything that one rank contributes to a checkpoint, already copied to the host."""

    step: int
    tensors: dict[str, Tensor]
    index: dict[str, Any]
    state: dict[str, Any]


def snapshot(
    step: int,
    pieces: Iterable[Piece],
    private_tensors: dict[str, Tensor],
    private: dict[str, Any],
    state: dict[str, Any],
) -> Snapshot:
    """Copy what this rank writes; `private` values and tensors are its own, `state` is the run's."""
    tensors: dict[str, Tensor] = {}
    listing: dict[str, Any] = {}
    for piece in pieces:
        if piece.written:
            key = tensor_key(piece)
            tensors[key] = piece.tensor.detach().to("cpu", copy=True).contiguous()
            listing[key] = index_entry(piece)
    for name, tensor in private_tensors.items():
        tensors[f"private/{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
    return Snapshot(step, tensors, {"pieces": listing, "private": private}, state)


class CheckpointManager:
    """Checkpoints of one run in `root`.

    All ranks call the same methods in the same order. The vote that commits a checkpoint runs on a gloo group
    of its own, so that it may run in the background while training communicates. A failed save leaves older
    checkpoints alone; `failure` then says why.
    """

    def __init__(self, root: Path, *, keep: int, asynchronous: bool, timeout_s: float) -> None:
        self.root, self.keep, self.asynchronous = root, keep, asynchronous
        self.failure: str | None = None
        self.last_saved: int | None = None
        self.fence: Callable[[], str | None] = lambda: None
        """Asked by rank 0 before a checkpoint is committed: why that must not be, if so."""
        self.fenced: str | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._rank = dist.get_rank()
        if self._rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(root)

    def save(self, content: Snapshot, *, wait: bool = False) -> None:
        """Write a checkpoint, in the background where configured, after a save still under way has ended."""
        self.wait()
        if self.asynchronous and not wait:
            self._thread = threading.Thread(target=self._in_background, args=(content,), name="checkpoint")
            self._thread.start()
        else:
            self._write(content)
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way has ended. Raises what ended it, where that was no failed write:
        the loss of another rank, or CheckpointError where another job has taken over the run.
        """
        self.close()
        error, self._error = self._error, None
        if error is not None:
            raise error
        if self.fenced is not None:
            raise CheckpointError(f"{self.fenced}; nothing more is written by this job")

    def close(self) -> None:
        """Wait until the save under way has ended, however it did."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _in_background(self, content: Snapshot) -> None:
        try:
            self._write(content)
        except BaseException as error:  # raised on the main thread, by `wait`
            self._error = error

    def _write(self, content: Snapshot) -> None:
        name: list[str | None] = [None]
        problem: str | None = None
        entries: dict[str, Any] = {}
        if self._rank == 0:
            try:
                name[0] = str(files.new_temporary(self.root, content.step))
            except OSError as error:
                problem = _reason(error)
        dist.broadcast_object_list(name, src=0, group=self._group)
        if name[0] is not None:
            try:
                entries = files.write_rank(Path(name[0]), self._rank, content.tensors, content.index)
            except Exception as error:  # safetensors raises its own class for a full disk
                problem = _reason(error)
        votes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(votes, (problem, entries), group=self._group)
        problems = [f"rank {rank}: {vote[0]}" for rank, vote in enumerate(votes) if vote[0]]
        outcome: list[str | None] = [None, None]
        if self._rank == 0 and name[0] is not None:
            outcome[1] = self.fence()
            if not problems and outcome[1] is None:
                try:
                    merged = {key: value for vote in votes for key, value in vote[1].items()}
                    files.commit(Path(name[0]), self.root, content.step, merged, content.state)
                    for step in files.list_steps(self.root)[self.keep :]:
                        files.remove(files.step_folder(self.root, step))
                except OSError as error:
                    outcome[0] = _reason(error)
            if problems or any(outcome):
                files.remove(Path(name[0]))
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        problems += [f"rank 0: {text}" for text in outcome if text]
        self.fenced = outcome[1]
        self.failure = "; ".join(problems) or None
        if self.failure is None:
            self.last_saved = content.step
        elif self._rank == 0:
            log.warning(
                "checkpoint of step %d was not written (%s); older ones are untouched",
                content.step,
                self.failure,
            )

    def open_newest(self, before: int | None = None) -> CheckpointReader | None:
        """The newest whole checkpoint, the same on all ranks, or None where there is none.

        Every file is hashed by one of the ranks before anything is parsed. Damaged checkpoints are named and
        set aside. `before` excludes later steps. Raises CheckpointError where checkpoints exist and none is
        whole.
        """
        self.wait()
        tried = 0
        while True:
            newest: list[int | None] = [None]
            if self._rank == 0:
                steps = [s for s in files.list_steps(self.root) if before is None or s < before]
                newest[0] = steps[0] if steps else None
            dist.broadcast_object_list(newest, src=0, group=self._group)
            if newest[0] is None:
                if tried:
                    raise CheckpointError(
                        f"none of the {tried} checkpoints in {self.root} is whole; "
                        "set checkpoint.resume=false to start afresh"
                    )
                return None
            path = files.step_folder(self.root, newest[0])
            problem = self.check(path)
            if problem is None:
                reader, problem = self._read(path)
                if reader is not None and problem is None:
                    return reader
            tried += 1
            if self._rank == 0:
                aside = files.quarantine(path)
                log.warning("%s; it was set aside as %s and the one before it is tried", problem, aside.name)
            dist.barrier(group=self._group)

    def check(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, agreed by all ranks, each of which hashes a share of the files."""
        problem: str | None = None
        try:
            files.verify(path, self._rank, dist.get_world_size())
        except (CheckpointError, OSError, KeyError, TypeError, AttributeError) as error:
            problem = str(error)
        return self._first(problem)

    def _read(self, path: Path) -> tuple[CheckpointReader | None, str | None]:
        """A reader of a checkpoint whose checksums fit, or why there can be none on some rank."""
        reader, problem = None, None
        try:
            reader = CheckpointReader(path)
        except CheckpointError as error:
            problem = str(error)
        return reader, self._first(problem)

    def _first(self, problem: str | None) -> str | None:
        """The first problem that any rank has."""
        problems: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem, group=self._group)
        return next((p for p in problems if p), None)


def _reason(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    lowered = text.lower()
    if getattr(error, "errno", None) == 28 or "no space" in lowered or "os error 28" in lowered:
        return "the disk is full (ENOSPC)"
    return text


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every random generator of this process, as tensors and plain values."""
    import random

    import numpy as np

    version, words, gauss = random.getstate()
    kind, keys, at, has_gauss, cached = np.random.get_state()
    tensors = {
        "rng/torch": torch.get_rng_state(),
        "rng/python": torch.tensor(words, dtype=torch.int64),
        "rng/numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_available():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    return tensors, {"python": [version, gauss], "numpy": [str(kind), int(at), int(has_gauss), float(cached)]}


def set_random_state(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """The inverse of `random_state`; `tensors` are named without the `rng/` prefix."""
    import random

    import numpy as np

    version, gauss = values["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, at, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), at, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
