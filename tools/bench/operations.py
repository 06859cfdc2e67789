"""What operations cost: a checkpoint in the background, a line of metrics, a resume on another layout.

    ltrain bench operations --out DIR [--hidden 384] [--layers 8]

The model is of Llama's shape with random weights; every figure is a median. A background save blocks training
for the copy to host memory, and for the rest of an earlier save if that is still under way. Run it on a quiet
machine: the times are of a few milliseconds.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

ROOT = Path(__file__).resolve().parents[2]


def config_tree(out: Path, hidden: int, layers: int) -> dict[str, Any]:
    return {
        "run": {"name": "operations", "output": str(out / "outputs")},
        "model": {
            "kind": "new",
            "family": "llama",
            "hidden_size": hidden,
            "num_layers": layers,
            "num_heads": hidden // 32,
            "num_kv_heads": hidden // 96,
            "ffn_hidden_size": hidden * 8 // 3,
            "max_position_embeddings": 2048,
            "tie_embeddings": True,
        },
        "data": {
            "sources": [{"kind": "text_tree", "path": "stdlib", "glob": "json/**/*.py"}],
            "holdout": 0.1,
        },
        "train": {"seq_len": 1024, "tokens_per_step": 2048, "steps": 12, "dtype": "fp32"},
        "optimizer": {"kind": "adamw", "lr": 1e-4},
        "schedule": {"kind": "constant"},
        "parallel": {"context": {"schedule": "ring", "block": 64}},
        "checkpoint": {"every": 0, "export": False},
        "metrics": {"console": "quiet"},
        "eval": {"max_tokens": 0},
    }


def costs(tree: dict[str, Any], rounds: int) -> dict[str, float]:
    """Seconds of a step, of the wait for a save and for a line of metrics; bytes of a checkpoint."""
    from ltrain.config.load import validate
    from ltrain.parallel.mesh import init_process_group
    from ltrain.train.build import build_run
    from ltrain.train.trainer import Trainer

    config = validate(tree)
    init_process_group(60)
    run = build_run(config)
    trainer = Trainer(config, run)
    lines, record = [], trainer.measure.step

    def timed(**arguments: Any) -> None:
        began = time.perf_counter()
        record(**arguments)
        lines.append(time.perf_counter() - began)

    trainer.measure.step = timed  # type: ignore[method-assign]
    steps: list[float] = []
    whole: list[float] = []
    blocked: list[float] = []
    for i in range(3 * rounds + 2):
        began = time.perf_counter()
        trainer.one_step()
        steps.append(time.perf_counter() - began)
        if i < 2:
            continue
        run.checkpoints.wait()
        began = time.perf_counter()
        run.checkpoints.asynchronous = i % 2 == 0
        trainer.save()
        (blocked if i % 2 == 0 else whole).append(time.perf_counter() - began)
    run.checkpoints.wait()
    size = sum(p.stat().st_size for p in max(run.checkpoints.root.glob("step-*")).iterdir())
    trainer.watch.close()
    trainer.measure.close()
    trainer.stop.restore()
    dist.destroy_process_group()
    found = {"step_s": steps[2:], "synchronous_s": whole, "blocked_s": blocked, "line_s": lines[2:]}
    return {name: statistics.median(values) for name, values in found.items()} | {
        "checkpoint_mib": size / 2**20,
        "parameters_m": run.spec.num_parameters / 1e6,
    }


def other_layout(tree: dict[str, Any], out: Path) -> float:
    """Largest relative difference of the loss after a resume on two context-parallel ranks."""
    tree = {
        **tree,
        "train": {**tree["train"], "steps": 6},
        "checkpoint": {"every": 2, "keep": 9, "export": False},
    }
    losses = []
    for name, ranks, degree in (("whole", 1, 1), ("resumed", 2, 2)):
        context = {**tree["parallel"]["context"], "degree": degree}
        changed = {**tree, "run": {**tree["run"], "name": name}, "parallel": {"context": context}}
        config = out / f"{name}.yaml"
        config.write_text(yaml.safe_dump(changed))
        folder = out / "outputs" / name
        if name == "resumed":
            shutil.copytree(out / "outputs" / "whole", folder)
            for step in (4, 6):
                shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
        launcher = [str(ROOT / "launch" / "elastic.py"), "--standalone", "--nproc-per-node", str(ranks)]
        target = [str(ROOT / "launch" / "train.py"), str(config)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        subprocess.run([sys.executable, *launcher, *target], check=True, env=environment)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append({r["step"]: r["train/loss"] for r in records if "train/loss" in r})
    assert losses[0].keys() == losses[1].keys()
    return max(abs(losses[1][step] / losses[0][step] - 1) for step in losses[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs; it is emptied")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4, help="pairs of saves, and a third of the steps")
    args = parser.parse_args()
    logging.getLogger("ltrain").setLevel(logging.ERROR)
    out = args.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tree = config_tree(out, args.hidden, args.layers)
    found = costs(tree, args.rounds)
    print({name: round(value, 5) for name, value in found.items()}, flush=True)
    found["other_layout"] = other_layout(tree, out)
    (out / "operations.json").write_text(json.dumps(found, indent=1))
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")
    print(f"{found['parameters_m']:.1f} M parameters, checkpoint of {found['checkpoint_mib']:.0f} MiB")
    print(f"step: {1e3 * found['step_s']:.0f} ms")
    whole, blocked, line = (1e3 * found[name] for name in ("synchronous_s", "blocked_s", "line_s"))
    print(f"save: {whole:.0f} ms; in the background {blocked:.0f} ms ({blocked / whole:.1%})")
    print(f"a line of metrics: {line:.2f} ms ({line / found['step_s'] / 1e3:.2%} of the step)")
    print(f"loss on another layout: {found['other_layout']:.1e} relative at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
