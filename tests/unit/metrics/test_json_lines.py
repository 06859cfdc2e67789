"""metrics.jsonl: whole lines only, on a full disk, after a kill and with a clock that is set."""

import json
import resource
import time

import pytest

from ltrain.metrics.sinks import JsonLines, read_metrics


@pytest.fixture
def file_limit():
    """A function that bounds the size of files, as a full disk would; `None` lifts the bound."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_wait_for_room_and_none_is_torn(tmp_path, file_limit):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in range(1, 4):
        lines.write(step, {"train/loss": 1.0})
    file_limit(path.stat().st_size + 20)
    for step in range(4, 7):
        lines.write(step, {"train/loss": 1.0})
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    assert path.read_text().endswith("\n")
    file_limit(None)
    lines.write(7, {"train/loss": 1.0})
    lines.close()
    assert [json.loads(line).get("step") for line in path.read_text().splitlines()[1:]] == list(range(1, 8))


def test_a_resumed_run_drops_a_damaged_end_and_repeated_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in range(1, 6):
        lines.write(step, {"train/loss": float(step)})
    lines.close()
    with path.open("ab") as file:
        file.write(b'{"step": 6, "tra\xff' + bytes(32) + b"\n[7]\n")
    again = JsonLines(path, resume_step=3)
    again.write(4, {"train/loss": float("nan")})
    again.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r.get("step") for r in records] == [None, 1, 2, 3, 4]
    assert records[-1]["train/loss"] is None


def test_times_go_on_when_the_clock_is_set(tmp_path, monkeypatch):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.write(1, {})
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real - 1e6)
    lines.write(2, {})
    lines.close()
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert 0 <= second["time"] - first["time"] < 60
