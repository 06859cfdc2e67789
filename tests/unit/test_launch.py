"""Launch scripts: they parse, pass shellcheck, and the SLURM script is rendered from the configuration."""

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("slurm/*"), ROOT / ".ci" / "run"])
QUICKSTART = str(ROOT / "configs" / "quickstart_base.yaml")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck")
def test_scripts_pass_shellcheck():
    done = subprocess.run(["shellcheck", "-x", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_every_variable_of_the_environment_has_a_reason_on_the_line_before():
    lines = (ROOT / "launch" / "environment.sh").read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        if line.startswith("export"):
            assert before.startswith("# ") and before.endswith("."), line


def _submit(*arguments):
    command = [sys.executable, "-m", "ltrain.cli", "submit", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_dry_run_writes_script_and_configuration_where_the_log_will_be(tmp_path):
    options = ["--nodes", "2", "--gpus-per-node", "1", "--partition", "long", "--dry-run"]
    done = _submit(QUICKSTART, *options, "--run.output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "quickstart-base" / "launch"
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "job.sbatch"]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["launch"], "the run itself is untouched"
    script = (folder / "job.sbatch").read_text()
    for line in ("#SBATCH --nodes=2", "#SBATCH --gpus-per-node=1", "#SBATCH --partition=long"):
        assert line in script.splitlines()
    assert f"#SBATCH --output={folder}/slurm-%j.out" in script
    assert f"set -- {folder}/config.yaml" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_two_groups_become_the_two_parts_of_one_job(tmp_path):
    groups = ["--group", "1:1:h100", "--group", "3:1", "--dry-run"]
    done = _submit(QUICKSTART, *groups, "--run.output", str(tmp_path), "--train.tokens_per_step", "8192")
    assert done.returncode == 0, done.stderr
    script = (tmp_path / "quickstart-base" / "launch" / "job.sbatch").read_text()
    first, second = script.split("#SBATCH hetjob\n")
    assert "#SBATCH --nodes=1\n" in first and "#SBATCH --constraint=h100" in first
    assert "#SBATCH --nodes=3\n" in second and "constraint" not in second
    assert "--het-group=0,1" in second


@pytest.mark.parametrize(
    "options,says",
    [
        (["--nodes", "3", "--gpus-per-node", "1"], "train.tokens_per_step=4096 must be a multiple"),
        (["--group", "two"], "--group='two' must be NODES:GPUS"),
        (["--group", "1:1", "--group", "1:1", "--group", "1:1"], "at most 2 times"),
        (["--gpus-per-node", "1", "--template", "none.sbatch"], "--template='none.sbatch' cannot be read"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(tmp_path, options, says):
    done = _submit(QUICKSTART, *options, "--run.output", str(tmp_path))
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_usage_of_the_local_launcher():
    done = subprocess.run(["bash", str(ROOT / "launch" / "local.sh")], capture_output=True, text=True)
    assert done.returncode == 2 and "usage:" in done.stderr
