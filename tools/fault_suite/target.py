"""What the launcher runs in place of launch/train.py: the trainer with faults at named points.

    target.py PLAN CONFIG [--section.field VALUE ...]

PLAN is a JSON file: `folder` for the record of what happened, and `faults`, each with `id`, `point`, `rank`,
`action`, and `step` (the optimizer step under way) or `nth` (the point's n-th passing in this process). A
fault happens once in a job, whatever is restarted, unless it says `repeat`. Nothing in ltrain knows of this.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Injector:
    """Passes points and makes the plan's faults happen there."""

    def __init__(self, plan: Path) -> None:
        described = json.loads(plan.read_text())
        self.folder = Path(described["folder"])
        self.rank = int(os.environ.get("RANK", "0"))
        self.faults = [f for f in described["faults"] if f.get("rank", self.rank) == self.rank]
        self.passed: Counter[str] = Counter()
        self.step = 0
        self.writing = Path()

    def begins(self, folder: Path, *arguments: Any) -> bool:
        """Note the folder of the checkpoint that is about to be written."""
        self.writing = folder
        return True

    def passing(self, point: str, value: Any = None) -> Any:
        """Called at a named point with what is computed there; returns that value, changed or not."""
        self.passed[point] += 1
        for fault in self.faults:
            if fault["point"] != point or not self._due(fault):
                continue
            changed = ACTIONS[fault["action"]](self, fault, value)
            value = value if changed is None else changed
        return value

    def _due(self, fault: dict[str, Any]) -> bool:
        here = self.step == fault["step"] if "step" in fault else self.passed[fault["point"]] == fault["nth"]
        if fault.get("repeat"):
            return self.step >= fault.get("step", 0)
        if not here:
            return False
        try:
            os.close(os.open(self.folder / f"fired-{fault['id']}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def record(self, **facts: Any) -> None:
        line = json.dumps({"rank": self.rank, "pid": os.getpid(), "time": time.time(), **facts}) + "\n"
        with (self.folder / f"steps-{self.rank}.jsonl").open("a") as file:
            file.write(line)


def _kill(injector: Injector, fault: dict[str, Any], value: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _signal(injector: Injector, fault: dict[str, Any], value: Any) -> None:
    target = os.getppid() if fault.get("to") == "launcher" else os.getpid()
    for _ in range(fault.get("times", 1)):
        os.kill(target, getattr(signal, fault["signal"]))
        time.sleep(0.2)


def _sleep(injector: Injector, fault: dict[str, Any], value: Any) -> None:
    time.sleep(fault["seconds"])


def _fail(injector: Injector, fault: dict[str, Any], value: Any) -> None:
    import torch

    errors = {
        "device memory": torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. (injected)"
        ),
        "host memory": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 B"),
        "bug": ValueError("injected"),
    }
    raise errors[fault["error"]]


def _scale(injector: Injector, fault: dict[str, Any], value: Any) -> Any:
    factor = float(fault["factor"])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, loss=value.loss * factor)  # type: ignore[call-overload]
    return value * factor


def _set_clock(injector: Injector, fault: dict[str, Any], value: Any) -> None:
    real = time.time
    time.time = lambda: real() + fault["seconds"]


def _fill_disk(injector: Injector, fault: dict[str, Any], value: Any) -> None:
    """Leave no free byte on the disk of the run."""
    with Path(fault["file"]).open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def _free_disk(injector: Injector, fault: dict[str, Any], value: Any) -> None:
    Path(fault["file"]).unlink()


def _cut_in_half(injector: Injector, fault: dict[str, Any], value: Any) -> None:
    """Leave half of this rank's tensors in the checkpoint that is being written, as a kill would, and die."""
    (data,) = (injector.writing / name for name in value if name.endswith(".safetensors"))
    os.truncate(data, data.stat().st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


ACTIONS: dict[str, Callable[[Injector, dict[str, Any], Any], Any]] = {
    "kill": _kill,
    "signal": _signal,
    "sleep": _sleep,
    "fail": _fail,
    "scale": _scale,
    "set_clock": _set_clock,
    "fill_disk": _fill_disk,
    "free_disk": _free_disk,
    "cut_in_half": _cut_in_half,
}


def before(owner: Any, name: str, point: str, injector: Injector, only: Callable[..., bool] | None = None):
    """Pass `point` before every call of `owner.name` (for whose arguments `only` holds)."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if only is None or only(*args, **kwargs):
            injector.passing(point)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def after(owner: Any, name: str, point: str, injector: Injector) -> None:
    """Pass `point` with the result of every call of `owner.name`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return injector.passing(point, original(*args, **kwargs))

    setattr(owner, name, wrapped)


def install(injector: Injector) -> None:
    """Wrap the trainer's functions at the points that faults are named for."""
    from ltrain.data import loader, store
    from ltrain.model.language_model import LanguageModel
    from ltrain.train import step, trainer
    from ltrain.train.checkpoint import folder

    after(store._Shards, "add", "tokenise", injector)
    before(loader.Loader, "next_step", "data", injector)
    before(step, "finalize_model_grads", "grad_sync", injector)
    before(trainer, "reduce_totals", "all_reduce", injector)
    after(trainer, "reduce_totals", "loss", injector)
    before(trainer, "optimizer_step", "optimizer", injector)
    after(trainer, "optimizer_step", "optimizer_done", injector)
    before(trainer, "evaluate", "evaluate", injector)
    before(folder, "new_temporary", "checkpoint_begin", injector)
    before(folder, "write_rank", "checkpoint_shard", injector, injector.begins)
    after(folder, "write_rank", "checkpoint_shard_done", injector)
    for file, point in (("manifest.json", "checkpoint_manifest"), ("COMPLETE", "checkpoint_marker")):
        before(folder, "write_bytes", point, injector, lambda path, data, file=file: path.name == file)
    for point, hidden in (("checkpoint_rename", True), ("checkpoint_renamed", False)):
        before(
            folder, "sync_folder", point, injector, lambda p, hidden=hidden: p.name.startswith(".") == hidden
        )
    before(folder.shutil, "rmtree", "checkpoint_remove", injector, lambda p, **_: ".trash-" in str(p))
    forward, one_step = LanguageModel.forward, trainer.Trainer.one_step

    def forward_with_points(self: Any, *args: Any, **kwargs: Any) -> Any:
        injector.passing("forward")
        output = forward(self, *args, **kwargs)
        if output.requires_grad:
            output.register_hook(lambda grad: injector.passing("backward", grad))
        return output

    def counted_step(self: Any) -> None:
        injector.step = self.run.step + 1
        injector.passing("step")
        one_step(self)
        injector.record(step=injector.step)

    LanguageModel.forward = forward_with_points  # type: ignore[method-assign]
    trainer.Trainer.one_step = counted_step  # type: ignore[method-assign]


def main() -> int:
    injector = Injector(Path(sys.argv[1]))
    injector.record(started=True)
    install(injector)
    from ltrain.cli import main as ltrain

    return ltrain(["train", *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
