"""Each part of ltrain switched on by itself, and all at once, beside the dense static run.

    python tools/bench/all_parts.py run --out DIR
    python tools/bench/all_parts.py report DIR

The run is that of `configs/all_cpu.yaml`: the quickstart's base model extended from 512 to 4,096 tokens by
four gloo processes, 16,384 tokens a step. `dense static` has none of the parts: two data-parallel groups of
two context-parallel ranks that reduce gradients every step. Every other arm adds one part with its own
settings, the last is the file itself. Sync makes two replicas, jobs of their own, of half the tokens each.
Bytes are counted on the loopback interface between the first and the last step, so nothing else may use it.
Arms run one after the other; an arm whose JSON file exists is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pages
import yaml

ROOT = Path(__file__).resolve().parents[2]
RANKS, REPLICAS = 4, 2
# What an arm takes from configs/all_cpu.yaml beyond the model, the data and the optimizer.
ARMS: dict[str, tuple[str, ...]] = {
    "dense static": (),
    "memory.level mlp": ("memory",),
    "vertical_slash": ("attention",),
    "planned groups": ("assignment",),
    "elimination, memory.level mlp": ("memory", "elimination"),
    "SparseLoCo": ("sync",),
    "all five": ("memory", "attention", "assignment", "elimination", "sync"),
}


def arm_tree(parts: tuple[str, ...], folder: Path, steps: int | None) -> dict[str, Any]:
    """The configuration file without the parts that the arm has not."""
    tree: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "all_cpu.yaml").read_text())
    for section in ("memory", "attention", "elimination", "sync"):
        if section not in parts:
            del tree[section]
    if "assignment" not in parts:
        del tree["parallel"]["assignment"]
    if "sync" in parts:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            tree["sync"]["peers"]["rendezvous"] = f"127.0.0.1:{probe.getsockname()[1]}"
        tree["sync"]["peers"]["token_file"] = str(folder / "token")
    else:
        tree["train"]["tokens_per_step"] *= REPLICAS
    tree["model"]["path"] = str((ROOT / tree["model"]["path"]).resolve())
    tree["run"] = {"name": "run", "seed": 1, "output": str(folder)}
    tree["data"]["cache"] = str(folder.parent / "cache")
    tree["checkpoint"] = {"every": 0, "resume": False, "export": False}
    tree["metrics"] = {"console": "quiet", "tensorboard": False, "wandb": "off"}
    if steps:
        tree["train"]["steps"] = steps
        tree["schedule"]["warmup_steps"] = min(tree["schedule"]["warmup_steps"], steps)
    return tree


def loopback_bytes() -> int:
    return int(Path("/sys/class/net/lo/statistics/tx_bytes").read_text())


def records_of(path: Path) -> list[dict[str, Any]]:
    from ltrain.metrics.sinks import read_metrics

    return read_metrics(path) if path.exists() else []


def steps_in(path: Path) -> list[dict[str, Any]]:
    return [record for record in records_of(path) if "train/loss" in record]


def run_arm(name: str, parts: tuple[str, ...], out: Path, steps: int | None) -> dict[str, Any]:
    """Train one arm on four processes and read what it cost from its own metrics."""
    folder = out / name.replace(" ", "_").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    tree = arm_tree(parts, folder, steps)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    if "sync" in parts:
        command = ["bash", str(ROOT / "launch" / "replicas.sh"), str(config), "a 2", "b 2 --run.seed 2"]
        runs = [folder / "run-a", folder / "run-b"]
    else:
        command = ["bash", str(ROOT / "launch" / "local.sh"), str(RANKS), str(config)]
        runs = [folder / "run"]
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": programs, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    metrics = [run / "metrics.jsonl" for run in runs]
    for path in metrics:
        path.unlink(missing_ok=True)
    counted: dict[int, int] = {}
    with (folder / "log").open("w") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while job.poll() is None:
            done = min(
                max((r["step"] for r in records_of(p) if "train/loss" in r), default=0) for p in metrics
            )
            counted.setdefault(done, loopback_bytes())
            time.sleep(0.05)
    if job.returncode:
        raise SystemExit(f"{name} ended with {job.returncode}; see {folder / 'log'}")
    records = [records_of(path) for path in metrics]
    steps_of = [steps_in(path) for path in metrics]
    last = len(steps_of[0])
    counted.setdefault(last, loopback_bytes())

    def total(metric: str) -> float:
        """A step's mean over the run, all replicas together."""
        return sum(sum(r.get(metric, 0.0) for r in own) for own in steps_of) / last

    first = min(step for step in counted if step > 0)
    tokens = sum(own[0]["train/tokens"] for own in steps_of)
    seconds = [max(r["perf/step_time_s"] for r in pair) for pair in zip(*steps_of, strict=True)][1:]
    return {
        "name": name,
        "steps": last,
        "tokens_per_s": tokens * len(seconds) / sum(seconds),
        "loopback_bytes": (counted[last] - counted[first]) / (last - first),
        "attention_bytes": total("comm/bytes_intra_node") + total("comm/bytes_inter_node"),
        "sync_bytes": total("sync/bytes_up"),
        "saved_bytes": steps_of[0][0]["mem/bytes_per_token_layer"],
        "host_gib": max(r["mem/max_allocated_gib"] for own in steps_of for r in own),
        "density": steps_of[0][0].get("sparse/density", 1.0),
        "kept": steps_of[0][0].get("elim/kept_frac", 1.0),
        "loss": statistics.mean([r for r in own if "eval/loss" in r][-1]["eval/loss"] for own in records),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The report; ratios are to the dense static run."""
    dense = next(row for row in rows if row["name"] == "dense static")
    head = ["", "tokens/s", "over dense", "MB on the wire a step", "of it attention"]
    head += ["of it between replicas", "bytes saved a token and layer", "density", "tokens kept"]
    head += ["held-out loss", "beside dense"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in sorted(rows, key=lambda row: list(ARMS).index(row["name"])):
        cells = [
            row["name"],
            f"{row['tokens_per_s']:,.0f}",
            f"{row['tokens_per_s'] / dense['tokens_per_s']:.2f} x",
            f"{row['loopback_bytes'] / 1e6:.1f}",
            f"{row['attention_bytes'] / 1e6:.1f}",
            f"{row['sync_bytes'] / 1e6:.2f}" if "sync" in ARMS[row["name"]] else "gradients",
            f"{row['saved_bytes']:,.0f}",
            f"{row['density']:.2f}",
            f"{row['kept']:.2f}",
            f"{row['loss']:.4f}",
            f"{100 * (row['loss'] / dense['loss'] - 1):+.2f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(f"{dense['steps']} steps; Python {dense['python']}, {dense['cores']} cores.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--only", nargs="+", choices=list(ARMS), help="arms")
    run.add_argument("--steps", type=int, help="other than the file's")
    report = commands.add_parser("report")
    report.add_argument("folder", type=Path)
    report.add_argument("--page", type=Path, default=Path("docs/benchmarks/all_parts.md"))
    options = parser.parse_args()
    if options.command == "run":
        options.out = options.out.resolve()
        for name, parts in ARMS.items():
            path = options.out / f"{name.replace(' ', '_').replace(',', '')}.json"
            if path.exists() or (options.only and name not in options.only):
                continue
            row = run_arm(name, parts, options.out, options.steps)
            path.write_text(json.dumps(row))
            print(f"{name}: {row['tokens_per_s']:,.0f} tokens/s, loss {row['loss']:.4f}", flush=True)
        return
    text = table([json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))])
    pages.put(options.page, text, "results")
    print(text)


if __name__ == "__main__":
    main()
