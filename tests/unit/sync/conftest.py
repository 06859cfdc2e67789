"""Processes and a rendezvous service for tests of the transport."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from support import sync_job

from ltrain.sync.coordinator import WaitPolicy
from ltrain.sync.rendezvous import Rendezvous

TOKEN = b"0123456789abcdef0123"
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["support.sync_job"])


class Lab:
    """A rendezvous service here, and replicas as processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token_file = folder, folder / "token"
        self.token_file.write_bytes(TOKEN)
        self.token_file.chmod(0o600)
        self.processes: dict[str, multiprocessing.Process] = {}
        self._read: dict[str, int] = {}
        self.service: Rendezvous | None = None

    def serve(self, num_replicas: int, *, min_s=0.3, max_s=20.0, port=0, planner=None) -> Rendezvous:
        policy = WaitPolicy(min_s, max_s, 4.0)
        self.service = Rendezvous(
            ("127.0.0.1", port), TOKEN, num_replicas, policy, log_path=self.folder / "log", planner=planner
        )
        return self.service

    def peers(self, replica: str, **more) -> dict:
        assert self.service is not None
        host, port = self.service.address
        return {"rendezvous": f"{host}:{port}", "token_file": str(self.token_file), "replica": replica,
                "connect_timeout_s": 15.0, "max_wait_s": 20.0} | more  # fmt: skip

    def job(self, replica: str, *options: str, name: str | None = None, **fields) -> None:
        sparse = {"density": 0.05, "bits": 1} if fields.get("kind", "sparse_loco") == "sparse_loco" else {}
        config = {"kind": "sparse_loco", "steps_per_round": 2} | sparse | fields
        config["peers"] = self.peers(replica) | fields.get("peers", {})
        name = name or replica
        arguments = [json.dumps(config), "--stop", str(self.folder / "stop"), *options]
        log = str(self.folder / f"{name}.out")
        process = _FORKS.Process(target=sync_job.run, args=(arguments, log), daemon=True)
        process.start()
        self.processes[name] = process

    def lines(self, name: str) -> list[dict]:
        path = self.folder / f"{name}.out"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def line(self, name: str, timeout_s: float = 60.0) -> dict:
        """The next report of a process."""
        deadline, at = time.monotonic() + timeout_s, self._read.get(name, 0)
        while len(found := self.lines(name)) <= at:
            assert time.monotonic() < deadline, f"{name} reported nothing for {timeout_s} s"
            assert self.processes[name].is_alive() or len(self.lines(name)) > at, f"{name} ended"
            time.sleep(0.02)
        self._read[name] = at + 1
        return found[at]

    def wait_round(self, name: str, round_: int) -> dict:
        while (report := self.line(name)).get("round") != round_:
            assert "refused" not in report, report
        return report

    def stop_after(self, round_: int) -> None:
        """All replicas end after this round, which none has begun."""
        (self.folder / "new").write_text(str(round_))
        (self.folder / "new").rename(self.folder / "stop")

    def signal(self, name: str, number: int) -> None:
        os.kill(self.processes[name].pid, number)

    def kill(self, name: str) -> None:
        """kill -9; the name may be used again, its earlier reports are dropped."""
        self.signal(name, signal.SIGKILL)
        self.died(name)

    def died(self, name: str) -> list[dict]:
        """The reports of a process that SIGKILL has ended; the name may be used again."""
        assert self.end(name) == -signal.SIGKILL
        reports = self.lines(name)
        (self.folder / f"{name}.out").unlink()
        self._read.pop(name, None)
        return reports

    def end(self, name: str, timeout_s: float = 60.0) -> int:
        """The exit code of a process, which is then forgotten."""
        process = self.processes.pop(name)
        process.join(timeout_s)
        return process.exitcode

    def results(self, timeout_s: float = 90.0) -> dict[str, list[dict]]:
        """All reports of all processes, which must have ended well."""
        for name, process in self.processes.items():
            process.join(timeout_s)
            assert process.exitcode == 0, f"{name}: {process.exitcode}\n{self.lines(name)[-1:]}"
        return {name: self.lines(name) for name in self.processes}

    def close(self) -> None:
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
            process.join()
        if self.service is not None:
            self.service.close()


@pytest.fixture
def lab(tmp_path):
    made = Lab(tmp_path)
    yield made
    made.close()


def digests_by_round(results: dict[str, list[dict]]) -> dict[tuple[int, str], set[str]]:
    """For every round and shard the digests that were seen: one each when the replicas agree."""
    seen: dict[tuple[int, str], set[str]] = {}
    for reports in results.values():
        for report in (report for report in reports if "digests" in report):
            for shard, digest in report["digests"].items():
                seen.setdefault((report["round"], shard), set()).add(digest)
    return seen
