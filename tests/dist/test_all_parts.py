"""configs/all_cpu.yaml, all five parts in one run, made small: ranks killed in the middle cost nothing.

Both replicas lose a rank before the second round, so that neither can close it without the other.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.tiny import write_text

from ltrain.config.load import validate
from ltrain.metrics.sinks import read_metrics
from ltrain.sync import serve

ROOT = Path(__file__).parents[2]
STEPS, ROUND = 6, 2


def _tree(folder, name):
    """The shipped configuration with a smaller model, shorter rows and rounds."""
    tree = yaml.safe_load((ROOT / "configs" / "all_cpu.yaml").read_text())
    assert tree["parallel"]["assignment"]["kind"] == "planned"
    assert tree["attention"]["pattern"]["kind"] == "vertical_slash"
    assert tree["elimination"]["kind"] == "blocks" and tree["elimination"]["anneal"] > 0
    assert tree["sync"]["kind"] == "sparse_loco" and tree["memory"]["level"] != "none"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    token = folder / "token"
    token.write_text("a secret of the two replicas")
    token.chmod(0o600)
    tree["run"] = {"name": "all", "seed": 1, "output": str(folder / name)}
    tree["model"] = {
        **{"kind": "new", "family": "llama", "hidden_size": 32, "num_layers": 3, "num_heads": 4},
        **{"num_kv_heads": 2, "ffn_hidden_size": 48, "max_position_embeddings": 512},
    }
    tree["rope"] = {"kind": "keep"}
    tree["data"] = {
        "sources": [{"kind": "text_tree", "path": str(folder / "text")}],
        "cache": str(folder / "cache"),
    }
    tree["train"] |= {"seq_len": 512, "tokens_per_step": 1024, "steps": STEPS, "timeout_s": 120}
    tree["parallel"]["context"]["block"] = 16
    tree["parallel"]["assignment"]["cluster"]["tokens_per_device"] = 512
    tree["attention"]["pattern"] |= {"dense_below": 0, "observed": 16, "window": 16, "sinks": 2}
    tree["attention"]["pattern"] |= {"max_verticals": 8, "max_slashes": 2, "vertical_p": 0.5, "slash_p": 0.5}
    tree["sync"] |= {"steps_per_round": ROUND, "density": 0.25}
    tree["sync"]["peers"] |= {"rendezvous": address, "token_file": str(token), "min_wait_s": 120}
    tree["checkpoint"] = {"every": ROUND, "export": False}
    tree["eval"] = {"max_tokens": 0}
    return tree


def _run(folder, name, *, killed):
    """Both replicas to their end; every step's metrics, by replica."""
    tree = _tree(folder, name)
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    markers = {replica: folder / f"kill-{replica}" for replica in "ab"}
    if killed:
        for marker in markers.values():
            marker.touch()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    service = serve(validate(tree).sync)
    jobs = []
    try:
        for replica, seed in (("a", 1), ("b", 2)):
            # The settings without which torchrun's restarts meet the store of the run before.
            launcher = ["bash", "-c", f'source {ROOT}/launch/environment.sh; exec "$@"', "bash"]
            launcher += [sys.executable, str(ROOT / "launch" / "elastic.py"), "--standalone"]
            program = [str(ROOT / "tests" / "support" / "killed_once.py")]
            options = ["--run.name", replica, "--run.seed", str(seed), "--sync.peers.replica", replica]
            command = [*launcher, "--nproc-per-node", "2", "--max-restarts", "2", *program, str(markers[replica])]
            log = (folder / f"{name}-{replica}.log").open("w")
            jobs.append(
                subprocess.Popen([*command, str(config), *options], env=environment, stdout=log, stderr=log)
            )
        codes = [job.wait(timeout=240) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
        service.close()
    logs = "\n".join((folder / f"{name}-{r}.log").read_text()[-3000:] for r in "ab")
    assert codes == [0, 0], logs
    assert not any(marker.exists() for marker in markers.values())
    return {r: read_metrics(folder / name / r / "metrics.jsonl") for r in "ab"}


@pytest.mark.slow
def test_killed_ranks_change_no_bit(tmp_path):
    write_text(tmp_path / "text", documents=80)
    whole = _run(tmp_path, "whole", killed=False)
    broken = _run(tmp_path, "broken", killed=True)
    for replica in "ab":
        steps = [[r for r in run[replica] if "train/loss" in r] for run in (whole, broken)]
        for name in ("train/loss", "train/grad_norm", "elim/kept_frac", "sync/drift", "sync/residual_norm"):
            one, two = ({r["step"]: r[name] for r in records if name in r} for records in steps)
            assert one == two and one, (replica, name)
    last = {r["step"]: r for r in whole["a"] if "train/loss" in r}
    assert sorted(last) == list(range(1, STEPS + 1))
    # Elimination keeps less than all at first and everything at the end; attention is sparse; rounds were held.
    assert last[1]["elim/kept_frac"] < 1 == last[STEPS].get("elim/kept_frac", 1)
    assert last[1]["sparse/density"] < 1
    assert last[STEPS]["sync/outer_steps"] == STEPS // ROUND and last[STEPS]["sync/peers"] == 2
    assert last[1]["balance/plan_micro_batches"] >= 1
