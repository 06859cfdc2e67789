"""Two faults of the suite: a rank killed while it trains, and a checkpoint damaged on disk."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "faults.py"


@pytest.mark.slow
def test_a_killed_rank_and_a_damaged_checkpoint_cost_what_they_may(tmp_path):
    chosen = ["--only", "kill-grad-sync", "checkpoint-bit"]
    done = subprocess.run(
        [sys.executable, str(TOOL), "--out", str(tmp_path), "--workers", "1", *chosen],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "2 faults, 0 not as they must be." in done.stdout
    for cell in ("kill -9 in gradient reduction", "one flipped bit in a checkpoint", "bitwise equal"):
        assert cell in done.stdout
