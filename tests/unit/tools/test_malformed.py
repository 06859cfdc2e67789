"""A sample of the generated malformed inputs; tools/malformed.py runs them all."""

import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[3] / "tools" / "malformed.py"


def test_malformed_input_is_refused_in_words_with_the_right_code(tmp_path):
    command = [sys.executable, str(TOOL), "--out", str(tmp_path / "cases"), "--every", "11"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "0 failed" in done.stdout
