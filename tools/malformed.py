"""Gives ltrain generated malformed input and sees that each is refused in words, soon, with the right code.

    python tools/malformed.py --out DIR [--every N]        all cases, or every N-th

Configurations, models and data go to `ltrain check` (exit code 2), damaged checkpoints to `ltrain export`
(exit code 3). Some of what is generated may be sound after all, or be repaired: exit code 0 counts only where
a case says so. A traceback, another code or more than 60 seconds is a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import yaml
from fault_suite.job import config_tree, write_text
from malformed_inputs import configs, files

LIMIT_S = 60


@dataclass
class Case:
    """A command line, and the exit codes that are right for it."""

    group: str
    name: str
    arguments: list[str]
    codes: tuple[int, ...] = (2,)


class Hang(Exception):
    pass


def call(arguments: list[str]) -> tuple[int | None, str, float]:
    """Run a command in this process. Returns its exit code (None: a traceback or a hang), what it printed on
    standard error, and seconds.
    """
    from ltrain.cli import main

    def too_long(number: int, frame: FrameType | None) -> None:
        raise Hang(f"not done after {LIMIT_S} s")

    errors = io.StringIO()
    handler = logging.StreamHandler(errors)
    logging.getLogger("ltrain").addHandler(handler)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT_S)
    began = time.monotonic()
    code: int | None = None
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = main(arguments)
    except SystemExit as error:  # argparse's
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:  # what a user would see as a traceback
        errors.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        logging.getLogger("ltrain").removeHandler(handler)
    return code, errors.getvalue(), time.monotonic() - began


def sound(folder: Path) -> dict[str, Any]:
    """A sound configuration of one process, with data, in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_text(folder / "text")
    return config_tree(folder, folder / "outputs")


def _write(folder: Path, name: str, tree: dict[str, Any]) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def all_cases(out: Path) -> Iterator[Case]:
    """Write every case's files below `out`, and yield it. Trains a tiny model once, for the checkpoints."""
    tree = sound(out)
    cut = {f"cut-{i}" for i in range(10)}
    for name, data, extra in configs.cases(tree):
        (out / f"config-{name}.yaml").write_bytes(data)
        # What is left of a cut file, or a value that fits another type, may be a configuration.
        codes = (0, 2) if name in cut or name.endswith("-odd") or name == "large" else (2,)
        yield Case("configuration", name, ["check", str(out / f"config-{name}.yaml"), *extra], codes)
    for name, source, damage in files.data_cases():
        folder = out / "data" / name
        folder.mkdir(parents=True)
        damage(folder)
        data = {**tree["data"], "sources": [{**source, "path": str(folder)}]}
        yield Case("data", name, ["check", _write(out, f"data-{name}", {**tree, "data": data})])
    steps = {**tree["train"], "steps": 2}
    checkpoint = {**tree["checkpoint"], "export": True}
    whole = _write(out, "sound", {**tree, "train": steps, "checkpoint": checkpoint})
    code, text, _ = call(["train", whole])
    if code != 0:
        raise SystemExit(f"the sound run ended with {code}:\n{text}")
    (store,) = (path.parent for path in (out / "cache").rglob("facts.json"))
    for name, damage in files.store_cases():
        shutil.copytree(store, out / "store" / name)
        damage(out / "store" / name)
        data = {**tree["data"], "sources": [{"kind": "tokens", "path": str(out / "store" / name)}]}
        yield Case("data", f"store-{name}", ["check", _write(out, f"store-{name}", {**tree, "data": data})])
    for name, damage in files.model_cases():
        folder = out / "model" / name
        shutil.copytree(out / "outputs" / "run" / "hf", folder)
        damage(folder)
        changed = {
            **tree,
            "model": {"kind": "hf", "path": str(folder)},
            "rope": {"kind": "yarn", "factor": 4},
        }
        yield Case("model", name, ["check", _write(out, f"model-{name}", changed)])
    for name, damage in files.checkpoint_cases():
        output = out / "checkpoint" / name
        shutil.copytree(out / "outputs" / "run" / "checkpoints", output / "run" / "checkpoints")
        damage(next((output / "run" / "checkpoints").glob("step-*")))
        config = _write(out, f"checkpoint-{name}", {**tree, "run": {"name": "run", "output": str(output)}})
        # A forged value may be one that export has no use for, or one that a user may have set (2).
        codes = (0, 2, 3) if name.startswith("forged") else (3,)
        yield Case("checkpoint", name, ["export", config, "--out", str(output / "hf")], codes)


def run(out: Path, every: int = 1) -> list[dict[str, Any]]:
    """Run the cases; returns those that failed and prints what each group came to."""
    counts: Counter[str] = Counter()
    codes: Counter[tuple[str, int | None]] = Counter()
    failed, slowest = [], 0.0
    for i, case in enumerate(all_cases(out)):
        if i % every:
            continue
        code, text, seconds = call(case.arguments)
        counts[case.group] += 1
        codes[case.group, code] += 1
        slowest = max(slowest, seconds)
        if code not in case.codes or "Traceback" in text or (code and not text.strip()):
            failed.append({"group": case.group, "name": case.name, "code": code, "text": text[-3000:]})
    for group, count in counts.items():
        by_code = {code: n for (g, code), n in codes.items() if g == group}
        print(f"{group}: {count} cases, exit codes {by_code}")
    print(f"{sum(counts.values())} cases, {len(failed)} failed, the slowest took {slowest:.1f} s")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the cases; it is emptied")
    parser.add_argument("--every", type=int, default=1, help="run every N-th case")
    args = parser.parse_args()
    failed = run(args.out.resolve(), args.every)
    for case in failed:
        print(json.dumps({k: v for k, v in case.items() if k != "text"}), case["text"], sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
