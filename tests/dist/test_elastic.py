"""The launcher: what it restarts, and the exit code that it ends with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = """
import os, signal, sys, time
from pathlib import Path
folder, codes = Path(sys.argv[1]), sys.argv[2].split(",")
rank, attempt = os.environ["RANK"], int(os.environ["TORCHELASTIC_RESTART_COUNT"])
(folder / f"started-{rank}-{attempt}").touch()
code = int(codes[min(attempt, len(codes) - 1)])
if code == 75:
    asked = []
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
    (folder / f"ready-{rank}").touch()
    while not asked:
        time.sleep(0.05)
if rank != "0" and code not in (0, 75):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def _launch(tmp_path, codes, restarts=2):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    command = [sys.executable, str(ROOT / "launch" / "elastic.py"), *options, *signals]
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, str(script), str(tmp_path), codes], env=environment, stderr=subprocess.PIPE, text=True
    )


def _starts(tmp_path):
    return len(list(tmp_path.glob("started-0-*")))


@pytest.mark.parametrize(
    "codes,code,starts,says",
    [
        ("-9,0", 0, 2, "rank 0 was killed (SIGKILL)"),
        ("2", 2, 1, "rank 0 ended with code 2: refused its input"),
    ],
)
def test_a_killed_worker_is_restarted_and_refused_input_is_not(tmp_path, codes, code, starts, says):
    job = _launch(tmp_path, codes)
    _, errors = job.communicate(timeout=60)
    assert (job.returncode, _starts(tmp_path)) == (code, starts), errors
    assert says in errors and "Traceback" not in errors


def test_a_signal_reaches_the_workers_and_their_code_is_the_launchers(tmp_path):
    job = _launch(tmp_path, "75")
    give_up = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert time.monotonic() < give_up and job.poll() is None
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 75, errors
    assert _starts(tmp_path) == 1
