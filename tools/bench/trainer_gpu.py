"""Training steps of a billion-parameter model on one GPU: tokens/s and peak memory of several configurations.

    python tools/bench/trainer_gpu.py --tokens 32768 --out outputs/trainer_gpu
    python tools/bench/trainer_gpu.py --variant "s2, mlp: --memory.level mlp --attention.pattern {kind: s2}"

Random weights in the shape of Llama-3.2-1B (16 layers, hidden 2048, 32:8 heads of 64, 128,256 tokens of
vocabulary), bf16, every row one document of natural text read as bytes. Each variant is a `torchrun` job of
its own, so that an out-of-memory error ends that variant alone. Writes trainer_gpu.json after every variant.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
LLAMA_1B = {
    "hidden_size": 2048,
    "num_layers": 16,
    "num_heads": 32,
    "num_kv_heads": 8,
    "ffn_hidden_size": 8192,
    "vocab_size": 128256,
}
VARIANTS = [
    "dense: ",
    "dense, memory norms: --memory.level norms",
    "dense, memory mlp: --memory.level mlp",
    "dense, memory full: --memory.level full",
    "dense, memory offload: --memory.level offload",
    "s2: --attention.pattern {kind: s2} --memory.level mlp",
    "vertical_slash: --attention.pattern {kind: vertical_slash} --memory.level mlp",
    "elimination 0.4 in layers 8-14: --memory.level mlp --elimination {kind: blocks, "
    "ratio: [1, 1, 1, 1, 1, 1, 1, 1, .4, .4, .4, .4, .4, .4, .4, 1]}",
]


def configuration(tokens: int, steps: int, out: Path) -> dict[str, Any]:
    """The run that all variants share."""
    return {
        "run": {"output": str(out)},
        "model": {"kind": "new", "family": "llama", "max_position_embeddings": tokens, **LLAMA_1B},
        "data": {
            "sources": [{"kind": "text_tree", "path": "stdlib"}],
            "packing": "concat_split",
            "document_mask": False,
            "cache": str(out / "cache"),
        },
        "train": {"seq_len": tokens, "tokens_per_step": 2 * tokens, "steps": steps, "dtype": "bf16"},
        "optimizer": {"kind": "adamw", "lr": 1e-4},
        "checkpoint": {"every": 0, "export": False},
        "eval": {"max_tokens": 0},
        "metrics": {"console": "quiet"},
    }


def measure(name: str, options: list[str], config: Path, out: Path, limit_s: float) -> dict[str, Any]:
    """One variant: medians of the steps after the second."""
    folder = "".join(c if c.isalnum() else "_" for c in name)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [sys.executable, *launcher, str(ROOT / "launch" / "train.py"), str(config)]
    command += ["--run.name", folder, "--checkpoint.resume", "false", *options]
    began = time.perf_counter()
    with (out / f"{folder}.log").open("w") as log:
        try:
            code: int | str = subprocess.run(command, stdout=log, stderr=log, timeout=limit_s).returncode
        except subprocess.TimeoutExpired:
            code = f"over {limit_s:.0f} s"
    result: dict[str, Any] = {"variant": name, "options": options, "exit": code}
    path = out / folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = [line for line in lines if "perf/step_time_s" in line][2:]
    for metric in (
        "perf/tokens_per_s",
        "perf/step_time_s",
        "mem/max_allocated_gib",
        "sparse/density",
        "train/loss",
    ):
        values = [step[metric] for step in steps if metric in step]
        if values:
            result[metric] = statistics.median(values)
    return {**result, "wall_s": round(time.perf_counter() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--variant", action="append", help="'NAME: overrides as for ltrain train'; repeatable"
    )
    parser.add_argument("--limit-s", type=float, default=120.0, help="time of a variant, start included")
    parser.add_argument("--out", type=Path, default=Path("outputs/trainer_gpu"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = args.out / "trainer_gpu.yaml"
    config.write_text(yaml.safe_dump(configuration(args.tokens, args.steps, args.out)))
    results = []
    for variant in args.variant or VARIANTS:
        name, _, options = variant.partition(": ")
        results.append(measure(name, split(options), config, args.out, args.limit_s))
        (args.out / "trainer_gpu.json").write_text(json.dumps(results, indent=1))
        print("  ".join(f"{key}={value}" for key, value in results[-1].items()), flush=True)


def split(options: str) -> list[str]:
    """`--a b --c {kind: d}` as arguments: a value in braces is one argument."""
    lexer = shlex.shlex(options.replace("{", "'{").replace("}", "}'"), posix=True)
    lexer.whitespace_split = True
    return list(lexer)


if __name__ == "__main__":
    main()
