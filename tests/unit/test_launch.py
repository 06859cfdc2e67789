"""Launch scripts: they parse, and the SLURM script is rendered from the configuration."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/*.sbatch"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def _submit(*arguments):
    command = [sys.executable, str(ROOT / "launch" / "submit.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_dry_run_prints_a_script_with_the_run_in_it(tmp_path):
    config = str(ROOT / "configs" / "quickstart_base.yaml")
    arguments = ["--nodes", "2", "--gpus-per-node", "1", "--partition", "long", "--dry-run"]
    done = _submit(config, *arguments, "--run.output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for line in ("#SBATCH --nodes=2", "#SBATCH --gpus-per-node=1", "#SBATCH --partition=long"):
        assert line in done.stdout.splitlines()
    assert f"set -- {tmp_path}/quickstart-base/config.yaml" in done.stdout
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def test_a_wrong_world_size_is_refused_before_anything_is_submitted(tmp_path):
    config = str(ROOT / "configs" / "quickstart_base.yaml")
    done = _submit(config, "--nodes", "3", "--gpus-per-node", "1", "--run.output", str(tmp_path))
    assert done.returncode == 2
    assert "train.tokens_per_step=4096 must be a multiple" in done.stderr


def test_usage_of_the_local_launcher():
    done = subprocess.run(["bash", str(ROOT / "launch" / "local.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "usage:" in done.stderr
