"""A run under a real SLURM controller: submitted, preempted, requeued, resumed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support import slurm
from support.tiny import tiny_tree, write_text

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm.missing() is not None, reason=f"no SLURM here: {slurm.missing()}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def _submit(cluster, folder, *options, **overrides):
    """Submit a tiny run of the two nodes; returns the job's number and the run's folder."""
    write_text(folder / "text")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tiny_tree(folder, metrics__console="plain", **overrides)))
    command = [sys.executable, "-m", "ltrain.cli", "submit", str(config), *options]
    cluster.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{cluster.environment['PATH']}"
    template = folder / "job.sbatch"
    source = ROOT / "slurm" / ("two_groups.sbatch" if "--group" in options else "train.sbatch")
    # The templates ask for whole GPU nodes; these have a core or two.
    text = source.read_text().replace("--cpus-per-task=96", "--cpus-per-task=1")
    template.write_text(text.replace("--cpus-per-task=48", "--cpus-per-task=1").replace("#SBATCH --exclusive\n", ""))
    environment = {**cluster.environment, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    time_limit = ["--time", "20", "--template", str(template)]
    done = subprocess.run([*command, *time_limit], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1], folder / "outputs" / "tiny"


def _records(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [r for line in lines if "train/loss" in (r := json.loads(line))]


def _log(run):
    return "".join(path.read_text() for path in (run / "launch").glob("slurm-*.out"))


def test_a_preempted_job_is_requeued_and_resumes_where_it_stopped(cluster, tmp_path):
    number, run = _submit(
        cluster, tmp_path, "--nodes", "2", "--gpus-per-node", "0", train__steps=4000, checkpoint__keep=1
    )
    give_up = time.monotonic() + 150
    while len(_records(run)) < 5:
        assert time.monotonic() < give_up, _log(run)
        time.sleep(0.2)
    cluster.run("scancel", "--signal=USR1", "--batch", number)
    give_up = time.monotonic() + 150
    while "continuing at step" not in _log(run):
        assert time.monotonic() < give_up, _log(run)
        time.sleep(0.5)
    log = _log(run)
    stopped = int(log.split("stopped at step ")[1].split()[0])
    assert f"continuing at step {stopped}" in log and f"stopped at step {stopped}; requeueing" in log
    assert cluster.job(number)["Restarts"] == "1"
    while _records(run)[-1]["step"] <= stopped:
        assert time.monotonic() < give_up, _log(run)
        time.sleep(0.2)
    steps = [record["step"] for record in _records(run)]
    assert steps == list(range(1, steps[-1] + 1)), "no step is lost and none stands twice"
    cluster.run("scancel", number)
    cluster.wait(number, ("CANCELLED",))


def test_two_groups_of_nodes_train_as_one_job(cluster, tmp_path):
    number, run = _submit(cluster, tmp_path, "--group", "1:0", "--group", "1:0", train__steps=2)
    cluster.wait(number, ("COMPLETED",), limit_s=150)
    assert [record["step"] for record in _records(run)] == [1, 2]
    assert "data 2 x pipeline 1 = 2 ranks" in _log(run)
