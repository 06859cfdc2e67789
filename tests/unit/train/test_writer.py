"""One writer a run folder."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ltrain.config.base import ConfigError
from ltrain.train.writer import Writer

HOLD = "import sys, time; from pathlib import Path; from ltrain.train.writer import Writer\n"
HOLD += "writer = Writer(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"is being written by process {first.pid} on"):
        Writer(tmp_path, patience_s=0.3)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    began = time.monotonic()
    second = Writer(tmp_path)
    assert time.monotonic() - began < 5
    assert second.generation == 2 and second.check() is None
    second.release()
    Writer(tmp_path, patience_s=0.3).release()


def test_a_newer_generation_fences_off_an_older_one(tmp_path):
    writer = Writer(tmp_path)
    facts = json.loads((tmp_path / "writer.json").read_text())
    (tmp_path / "writer.json").write_text(json.dumps({**facts, "generation": 2, "host": "elsewhere"}))
    assert "was taken over by process" in (writer.check() or "")
    writer.release()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"generation": "x"}'])
def test_a_damaged_record_does_not_stop_a_run(tmp_path, damage):
    (tmp_path / "writer.json").write_text(damage)
    writer = Writer(tmp_path)
    assert writer.generation == 1 and writer.check() is None
    writer.release()
