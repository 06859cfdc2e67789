"""A whole training step, sparse against dense, on two CPU processes that share one long document.

    python tools/bench/sparse_step.py run --out DIR
    python tools/bench/sparse_step.py report DIR

Every arm is the ordinary trainer (`launch/train.py`, context parallel 2 over gloo, one thread a process) with
another `attention.pattern`; seconds of a step, of attention in it, and of the search for what to attend are
the run's own metrics, medians without the first step. Arms run one after the other; an arm whose JSON file
exists is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pages
import yaml

ROOT = Path(__file__).resolve().parents[2]


def patterns(tokens: int, block: int) -> dict[str, dict[str, Any]]:
    """Patterns that keep about 5 % of the causal blocks; a mean row sees half of all blocks."""
    kept = max(3, round(0.05 * tokens / block / 2))
    return {
        "vertical_slash": {
            **{"kind": "vertical_slash", "verticals": "tokens", "window": block, "max_verticals": 64},
            "max_slashes": max(1, kept // 2 - 2),
        },
        "block_topk": {"kind": "block_topk", "top_k": kept},
        "xattention": {"kind": "xattention", "threshold": 0.05},
        "seer_gate": {"kind": "seer_gate", "top_k": kept},
        "sliding_window": {"kind": "sliding_window", "window": (kept - 2) * block + 1, "sinks": block},
        "dense": {"kind": "dense"},
    }


def run_arm(out: Path, name: str, pattern: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The medians of one arm."""
    text = out / "text"
    if not text.exists():
        text.mkdir()
        rng = np.random.default_rng(0)
        letters = rng.integers(97, 122, options.tokens * options.steps, dtype=np.uint8)
        (text / "text.txt").write_bytes(letters.tobytes())
    tree = {
        "run": {"name": name, "output": str(out / "runs")},
        "model": {
            **{"kind": "new", "family": "llama", "vocab_size": 258, "hidden_size": 256, "num_heads": 4},
            **{"num_layers": options.layers, "num_kv_heads": 2, "ffn_hidden_size": 768},
            "max_position_embeddings": options.tokens,
        },
        "data": {
            "sources": [{"kind": "text_tree", "path": str(text)}],
            **{"packing": "concat_split", "document_mask": False, "cache": str(out / "cache")},
        },
        "train": {
            **{"seq_len": options.tokens, "tokens_per_step": options.tokens, "dtype": "fp32"},
            **{"steps": options.steps, "timeout_s": 300},
        },
        "optimizer": {"kind": "adamw", "lr": 1e-4},
        "parallel": {"context": {"degree": 2, "schedule": "ring", "block": options.block}},
        "attention": {"pattern": pattern},
        "checkpoint": {"every": 0, "resume": False, "export": False},
        "eval": {"max_tokens": 0},
        "metrics": {"console": "quiet"},
    }
    config = out / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (out / f"{name}.log").open("w") as log:
        subprocess.run(
            [sys.executable, *launcher, str(ROOT / "launch" / "train.py"), str(config)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
    lines = (out / "runs" / name / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "perf/step_time_s" in r][1:]

    def median(metric: str) -> float:
        return statistics.median(r.get(metric, 0.0) for r in records)

    import torch

    return {
        "name": name,
        "pattern": pattern,
        "tokens": options.tokens,
        "layers": options.layers,
        "steps": len(records),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        **{
            metric: median(metric)
            for metric in (
                *("perf/step_time_s", "time/attention_s", "time/selection_s", "time/attention_comm_s"),
                *("sparse/density", "comm/bytes_intra_node", "balance/work_max_over_mean"),
                *("balance/exchange_step_max_over_mean", "mem/max_allocated_gib"),
            )
        },
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The report; ratios are to the dense arm, selection's share is of the arm's attention and selection."""
    dense = next(row for row in rows if row["name"] == "dense")
    head = ["pattern", "density", "step s", "over dense", "attention s", "selection s", "its share"]
    head += ["waits s", "MB sent", "work, busiest over mean", "host GiB a process"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        attention, selection = row["time/attention_s"], row["time/selection_s"]
        sparse = row is not dense
        cells = [
            f"`{row['name']}`",
            f"{row['sparse/density']:.3f}" if sparse else "1",
            f"{row['perf/step_time_s']:.2f}",
            f"{dense['perf/step_time_s'] / row['perf/step_time_s']:.2f} x",
            f"{attention:.2f}",
            f"{selection:.3f}",
            f"{100 * selection / (attention + selection):.1f} %" if sparse else "",
            f"{row['time/attention_comm_s']:.2f}",
            f"{row['comm/bytes_intra_node'] / 1e6:.0f}",
            f"{row['balance/work_max_over_mean']:.3f}",
            f"{row['mem/max_allocated_gib']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    first = rows[0]
    lines.append("")
    lines.append(
        f"{first['tokens']:,} tokens, {first['layers']} layers; Python {first['python']}, torch "
        f"{first['torch']}, {first['cores']} cores; medians of {first['steps']} steps."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--tokens", type=int, default=32768)
    run.add_argument("--block", type=int, default=128)
    run.add_argument("--layers", type=int, default=2)
    run.add_argument("--steps", type=int, default=4)
    run.add_argument("--only", nargs="+", help="names of arms")
    report = commands.add_parser("report")
    report.add_argument("folder", type=Path)
    report.add_argument("--page", type=Path, default=Path("docs/benchmarks/context_parallel.md"))
    options = parser.parse_args()
    if options.command == "run":
        options.out = options.out.resolve()
        options.out.mkdir(parents=True, exist_ok=True)
        for name, pattern in patterns(options.tokens, options.block).items():
            path = options.out / f"{name}.json"
            if path.exists() or (options.only and name not in options.only):
                continue
            row = run_arm(options.out, name, pattern, options)
            path.write_text(json.dumps(row))
            print(f"{name}: {row['perf/step_time_s']:.2f} s a step", flush=True)
        return
    text = table([json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))])
    pages.put(options.page, text, "sparse step")
    print(text)


if __name__ == "__main__":
    main()
