"""Scenarios that need more than one launch after another: their own course, and their own checks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fault_suite.job import Job


def launches(job: Job, scenario: Any) -> None:
    """The ordinary course: a launch with the faults, then the same command again as often as `codes` says."""
    for i, _ in enumerate(scenario.codes):
        job.launch(scenario.faults if i == 0 else ())


def kill_launcher(job: Job, scenario: Any) -> None:
    began = time.monotonic()
    process = job.start([{"point": "step", "rank": 0, "step": 6, "action": "sleep", "seconds": 60}])
    _until(lambda: job.executed()[-1:] == [5], process)
    os.kill(process.pid, signal.SIGKILL)
    outcome = job.finish(process, began)
    outcome.code = 0 if outcome.code == -signal.SIGKILL else outcome.code
    time.sleep(1)
    if job.orphans():
        outcome.text += f"\norphans: {job.orphans()}"
        outcome.code = -1
    job.outcomes[-1:] = []
    job.launch()


def lose_rendezvous(job: Job, scenario: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def both(faults: list[dict[str, Any]]) -> list[subprocess.Popen[str]]:
        where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "suite"]
        where += ["--rdzv-endpoint", f"127.0.0.1:{port}"]
        first = job.start(faults, where)
        time.sleep(1)  # the first one to come holds the store
        return [first, job.start(faults, where)]

    began, log = time.monotonic(), job.log()
    jobs = both([{"point": "step", "rank": r, "step": 6, "action": "sleep", "seconds": 60} for r in (0, 1)])
    _until(lambda: job.executed()[-1:] == [5] and job.executed(1)[-1:] == [5], jobs[1])
    killed = time.monotonic()
    os.kill(jobs[0].pid, signal.SIGKILL)
    codes = [job.finish(process, began, 90, log).code for process in jobs]
    ended = time.monotonic() - killed
    began, log = time.monotonic(), job.log()
    jobs = both([])
    codes += [job.finish(process, began, log=log).code for process in jobs]
    last = job.outcomes[-1]
    job.outcomes[:] = [last]
    if -1 in codes or any(codes[2:]) or ended > 60:
        last.text += f"\nexit codes {codes}; the other node took {ended:.0f} s to end"
        last.code = -1


def with_deadline(job: Job, scenario: Any) -> None:
    job.overrides = ("--train.max_minutes", "0.04")
    job.launch(scenario.faults)
    job.overrides = ()
    job.launch()


def same_folder(job: Job, scenario: Any) -> None:
    """Stop a job, damage what it left, go on in the same folder."""
    job.launch([{"point": "step", "rank": 1, "step": 6, "action": "signal", "signal": "SIGUSR1"}])
    job.outcomes[:] = []
    scenario.prepare(job)
    job.launch()


def stale_build(job: Job, scenario: Any) -> None:
    from fault_suite import damage

    job.environment["TORCH_EXTENSIONS_DIR"] = str(job.folder / "extensions")
    damage.leave_build_lock(job)
    job.launch()


def second_job(job: Job, scenario: Any) -> None:
    began = time.monotonic()
    first = job.start(scenario.faults)
    log = job.log()
    _until(lambda: job.executed()[-1:] == [2], first)
    rival = Job(job.folder / "rival", output=job.output)
    second = rival.launch()
    text = log.read_text()
    job.outcomes.append(second)
    code = first.wait(timeout=120)
    job.outcomes.append(type(second)(code, round(time.monotonic() - began, 1), text))


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own (needs root)."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(job: Job, scenario: Any) -> None:
    """Nothing is free from step 4 on; step 5 makes room again."""
    ballast = str(job.folder / "disk" / "ballast")
    with small_disk(job.folder / "disk", "4m") as disk:
        _move_output(job, disk)
        full = {"point": "checkpoint_begin", "rank": 0, "nth": 2, "action": "fill_disk", "file": ballast}
        free = {"point": "data", "rank": 0, "step": 5, "action": "free_disk", "file": ballast}
        job.launch([full, free])
        if len(scenario.codes) > 1:
            Path(ballast).unlink()
            job.launch()
        _keep(job)


def read_only(job: Job, scenario: Any) -> None:
    with small_disk(job.folder / "disk", "4m") as disk:
        _move_output(job, disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        job.launch()
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        job.launch()
        _keep(job)


def _move_output(job: Job, disk: Path) -> None:
    job.output = disk / "outputs"
    job.overrides = (*job.overrides, "--run.output", str(job.output))


def _keep(job: Job) -> None:
    """Copy the run off a file system that is about to go."""
    kept = job.folder / "kept"
    shutil.copytree(job.run, kept / "run")
    job.output = kept


def one_skipped_step(job: Job) -> list[str]:
    skipped = [r["train/skipped_steps"] for r in _records(job)]
    return [] if skipped == [0] * 4 + [1] * 4 else [f"skipped steps by step: {skipped}"]


def one_rollback(job: Job) -> list[str]:
    rollbacks = [r["train/rollbacks"] for r in _records(job)]
    return [] if rollbacks and rollbacks[-1] == 1 else [f"rollbacks by step: {rollbacks}"]


def _records(job: Job) -> list[dict[str, Any]]:
    lines = (job.run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "train/loss" in (record := json.loads(line))]


def _until(condition: Any, process: subprocess.Popen[str], limit_s: float = 120) -> None:
    give_up = time.monotonic() + limit_s
    while not condition():
        if process.poll() is not None or time.monotonic() > give_up:
            raise RuntimeError("the job did not get to where the fault strikes")
        time.sleep(0.05)
