"""A training job of two processes under the launcher, and what is known of it afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(__file__).with_name("target.py")
STEPS, EVERY = 8, 2
LIMIT_S = 240.0


def write_text(folder: Path, documents: int = 60) -> None:
    """A folder of small text files, the same every time."""
    rng = np.random.default_rng(0)
    words = [
        "def",
        "return",
        "import",
        "class",
        "self",
        "value",
        "for",
        "in",
        "range",
        "while",
        "None",
        "sum",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        (folder / f"doc{i:03d}.py").write_text(" ".join(rng.choice(words, int(rng.lognormal(2.3, 0.9)) + 2)))


def config_tree(folder: Path, output: Path) -> dict[str, Any]:
    return {
        "run": {"name": "run", "output": str(output)},
        "model": {
            "kind": "new",
            "family": "llama",
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 48,
            "max_position_embeddings": 128,
            "tie_embeddings": False,
        },
        "data": {
            "sources": [{"kind": "text_tree", "path": str(folder / "text")}],
            "cache": str(folder / "cache"),
        },
        "train": {"seq_len": 208, "tokens_per_step": 832, "steps": STEPS, "dtype": "fp32", "timeout_s": 60},
        "optimizer": {"kind": "adamw", "lr": 0.01},
        "schedule": {"kind": "constant"},
        "parallel": {"context": {"schedule": "ring", "block": 16}},
        "checkpoint": {"every": EVERY, "asynchronous": False, "export": False},
        "metrics": {"console": "quiet"},
        "eval": {"max_tokens": 0},
    }


@dataclass
class Outcome:
    """One launch: exit code, seconds, and everything that it printed."""

    code: int
    seconds: float
    text: str


@dataclass
class Job:
    """One run of the suite in a folder of its own; every `launch` continues it."""

    folder: Path
    overrides: tuple[str, ...] = ()
    output: Path | None = None
    restarts: int = 3
    environment: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        write_text(self.folder / "text")
        self.output = self.output or self.folder / "outputs"
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config_tree(self.folder, self.output)))

    @property
    def run(self) -> Path:
        assert self.output is not None
        return self.output / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def start(
        self, faults: Sequence[dict[str, Any]] = (), launcher: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        """Begin a launch; its output goes to `launch-N.log`."""
        plan = self.folder / f"plan-{len(self.outcomes)}.json"
        named = [{"id": f"{len(self.outcomes)}-{i}", **fault} for i, fault in enumerate(faults)]
        plan.write_text(json.dumps({"folder": str(self.folder), "faults": named}))
        where = launcher or ["--standalone", "--nproc-per-node", "2"]
        command = [
            *(sys.executable, str(ROOT / "launch" / "elastic.py"), *where),
            *("--max-restarts", str(self.restarts), "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"),
            *(str(TARGET), str(plan), str(self.folder / "config.yaml"), *self.overrides),
        ]
        environment = {**os.environ, **launch_environment(), **self.environment}
        with self.log().open("a") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, text=True, start_new_session=True
            )

    def log(self) -> Path:
        return self.folder / f"launch-{len(self.outcomes)}.log"

    def finish(
        self, process: subprocess.Popen[str], began: float, limit_s: float = LIMIT_S, log: Path | None = None
    ) -> Outcome:
        """Wait for a launch. A launch that doesn't end in `limit_s` is a hang: code -1."""
        log = log or self.log()
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            code = -1
        outcome = Outcome(code, round(time.monotonic() - began, 1), log.read_text())
        self.outcomes.append(outcome)
        return outcome

    def launch(self, faults: Sequence[dict[str, Any]] = (), launcher: Sequence[str] = ()) -> Outcome:
        began = time.monotonic()
        return self.finish(self.start(faults, launcher), began)

    def executed(self, rank: int = 0) -> list[int]:
        """Every step that a rank completed, in order, repeated ones included."""
        return [entry["step"] for entry in self._records(rank) if "step" in entry]

    def starts(self, rank: int = 0) -> int:
        return sum("started" in entry for entry in self._records(rank))

    def _records(self, rank: int) -> list[dict[str, Any]]:
        path = self.folder / f"steps-{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def recovery_s(self) -> float | None:
        """Seconds from the last fault to the next completed step of rank 0."""
        fired = [p.stat().st_mtime for p in self.folder.glob("fired-*")]
        after = [e["time"] for e in self._records(0) if "step" in e and fired and e["time"] > max(fired)]
        return round(after[0] - max(fired), 1) if after else None

    def orphans(self) -> list[int]:
        """Processes of this job that still live."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and str(self.folder).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


def launch_environment() -> dict[str, str]:
    """The variables of launch/environment.sh, as the launch scripts set them."""
    script = f"set -a; source {ROOT}/launch/environment.sh; env -0"
    text = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    names = re.findall(r"^export (\w+)=", (ROOT / "launch" / "environment.sh").read_text(), re.MULTILINE)
    values = dict(item.split("=", 1) for item in text.split("\0") if "=" in item)
    return {**{name: values[name] for name in names}, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def losses(run: Path) -> dict[int, tuple[Any, ...]]:
    """Loss, gradient norm and tokens by step, as logged."""
    names = ("train/loss", "train/grad_norm", "train/lr", "train/tokens")
    found: dict[int, tuple[Any, ...]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "train/loss" in record:
            if record["step"] in found:
                raise ValueError(f"step {record['step']} is logged twice")
            found[record["step"]] = tuple(record[name] for name in names)
    return found


def state_hash(run: Path) -> str:
    """A hash of the newest checkpoint's tensors of every rank: parameters, moments, random states."""
    newest = max((run / "checkpoints").glob("step-*"), key=lambda p: p.name)
    digest = hashlib.sha256(newest.name.encode())
    for path in sorted(newest.glob("rank-*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
