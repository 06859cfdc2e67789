"""The quickstart: a base model at 512 tokens, its extension to 4096 on two processes, and what happened.

The base model is kept in the cache, so that a second run starts with the extension.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(".cache/ltrain/quickstart")
BASE_CONFIG = ROOT / "configs" / "quickstart_base.yaml"
CONFIG = ROOT / "configs" / "quickstart.yaml"


def launch(config: Path, ranks: int, *overrides: str) -> None:
    """Train on `ranks` gloo processes of this machine."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)),
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"),
        *(str(ROOT / "launch" / "train.py"), str(config), *overrides),
    ]
    code = subprocess.run(command, env=environment).returncode
    if code:
        sys.exit(code)


def base_model(folder: Path) -> None:
    """Train and export the base model, unless the cache holds the one of this configuration."""
    key = hashlib.sha256(BASE_CONFIG.read_bytes()).hexdigest()
    marker = folder / "quickstart_key"
    if marker.is_file() and marker.read_text() == key:
        print(f"base model: {folder} (kept from an earlier run)", flush=True)
        return
    print("step 1 of 3: a base model at 512 tokens, on the text of the Python standard library", flush=True)
    output = CACHE / "runs"
    shutil.rmtree(output, ignore_errors=True)
    launch(BASE_CONFIG, 2, "--run.output", str(output))
    shutil.rmtree(folder, ignore_errors=True)
    (output / "quickstart-base" / "hf").rename(folder)
    marker.write_text(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs=argparse.REMAINDER, help="--section.field VALUE for the extension")
    arguments = parser.parse_args()
    began = time.monotonic()
    base_model(CACHE / "base")
    print("step 2 of 3: the context from 512 to 4096 tokens, on two processes", flush=True)
    shutil.rmtree("outputs/quickstart", ignore_errors=True)
    launch(CONFIG, 2, *arguments.overrides)
    print("step 3 of 3: the result", flush=True)
    subprocess.run([sys.executable, "-m", "ltrain.cli", "report", "outputs/quickstart"], check=True)
    print(f"{time.monotonic() - began:.0f} s in all", flush=True)


if __name__ == "__main__":
    main()
