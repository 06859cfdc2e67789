"""The trainer against a bare PyTorch loop, and context parallel 2 against 1; prints medians and ratios.

    python tools/bench/trainer.py --tokens 8192 --steps 8

Bare loop: `transformers`' Llama with SDPA, fused AdamW, clipping, one process. Ours: `ltrain train` on rows
of as many tokens, each one document. Both use all cores; context parallel 2 is two processes with half of
them each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"hidden_size": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 2, "ffn_hidden_size": 768}
VOCAB = 258


def bare(tokens: int, steps: int, threads: int) -> list[float]:
    """Seconds of each step of the bare loop."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    config = LlamaConfig(
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["ffn_hidden_size"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_heads"],
        vocab_size=VOCAB,
        max_position_embeddings=tokens,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, tokens)))
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds


def ours(folder: Path, tokens: int, steps: int, ranks: int, threads: int) -> list[float]:
    """Seconds of each step of the trainer on `ranks` processes that share every row."""
    text = folder / "text"
    if not text.exists():
        text.mkdir()
        rng = np.random.default_rng(0)
        for i in range(4):
            (text / f"{i}.txt").write_bytes(rng.integers(97, 122, tokens * steps, dtype=np.uint8).tobytes())
    name = f"cp{ranks}"
    tree = {
        "run": {"name": name, "output": str(folder)},
        "model": {
            "kind": "new",
            "family": "llama",
            "vocab_size": VOCAB,
            "max_position_embeddings": tokens,
            **SHAPE,
        },
        "data": {
            "sources": [{"kind": "text_tree", "path": str(text)}],
            "packing": "concat_split",
            "document_mask": False,
            "cache": str(folder / "cache"),
        },
        "train": {"seq_len": tokens, "tokens_per_step": tokens, "steps": steps, "dtype": "fp32"},
        "optimizer": {"kind": "adamw", "lr": 1e-4},
        "parallel": {"context": {"degree": ranks, "schedule": "ring"}},
        "checkpoint": {"every": 0, "export": False},
        "eval": {"max_tokens": 0},
        "metrics": {"console": "quiet"},
    }
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "ignore", *launcher, str(ROOT / "launch" / "train.py"), str(config)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [r["perf/step_time_s"] for r in map(json.loads, lines) if "perf/step_time_s" in r]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {
            "bare transformers loop": bare(args.tokens, args.steps, cores),
            "ltrain, 1 process": ours(folder, args.tokens, args.steps, 1, cores),
            "ltrain, context parallel 2": ours(folder, args.tokens, args.steps, 2, max(1, cores // 2)),
        }
    medians = {run: statistics.median(seconds[2:]) for run, seconds in runs.items()}
    for run, seconds in medians.items():
        print(f"{run:28s} {args.tokens / seconds:9,.0f} tokens/s")
    one = medians["ltrain, 1 process"]
    print(f"trainer over bare loop       {medians['bare transformers loop'] / one:9.2f}")
    print(f"context parallel 2 over 1    {one / medians['ltrain, context parallel 2']:9.2f}")


if __name__ == "__main__":
    main()
