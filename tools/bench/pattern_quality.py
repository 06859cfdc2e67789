"""What sparse patterns and token elimination cost in quality: one short extension each, same tokens.

    python tools/bench/pattern_quality.py run --workers 16 --out DIR
    python tools/bench/pattern_quality.py report DIR --docs docs/benchmarks

A small byte model is trained at 512 tokens and extended to 4,096 (YaRN, factor 8) by each arm. The
documents are the Python standard library's source, into which records are woven: a key and a value, bytes
above 127 that no source uses, the values drawn anew for every document. A key comes back several times,
always with its value, so that every later occurrence asks for a fact that stands a known number of tokens
back. What is measured on held-out documents: loss by position, and the share of recalls with probability
above one half by distance to the nearest earlier occurrence. Every arm is a run of the ordinary trainer in
its own process of one thread, and one JSON file; arms whose file exists are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 32
SHORT, LONG = 512, 4096
KEYS, VALUES = 8, 8
# Tokens: 128 + 8 key + value states a value, 14 + key asks for it, 1 + value answers.
STATED, ASKED, ANSWERED = 128, 14, 1
DISTANCES = (128, 512, 1024, 2048, LONG)
# About 10 % of the causal blocks at 4,096 tokens, as far as a pattern's fields allow.
PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "vertical_slash": {
        **{"kind": "vertical_slash", "verticals": "tokens", "dense_below": 0, "window": 64, "sinks": 16},
        **{"anchors": 4, "max_verticals": 64, "max_slashes": 2},
    },
    "s2": {"kind": "s2", "local_blocks": 4, "stride": 24},
    "sliding_window": {"kind": "sliding_window", "window": 160, "sinks": 32},
    "longgen": {"kind": "longgen", "sparse": {"kind": "sliding_window", "window": 160, "sinks": 32}},
    "xattention": {"kind": "xattention", "threshold": 0.5},
    "block_topk": {"kind": "block_topk", "top_k": 6},
    "seer_gate": {"kind": "seer_gate", "top_k": 6, "gate_dim": 32, "target_rows": 8},
    "nsa": {"kind": "nsa", "top_k": 4, "window": 64, "compress": 16, "initial_gates": [0.1, 1.0, 0.1]},
}

# Arms that are no pattern: dense attention, fewer tokens in two of three layers, all again at the end.
ELIMINATION = {
    "elimination": {
        **{"kind": "blocks", "block": BLOCK, "ratio": 0.5, "dense_layers": [0], "strata": 4, "anneal": 0.2},
    },
}
ARMS = [*PATTERNS, *ELIMINATION]


def write_documents(
    folder: Path, seed: int, count: int, length: int, questions: int, drills: int = 0
) -> None:
    """A store of `count` documents of `length` tokens: source text with every key stated once and asked for
    `questions` times. Between them stand `drills` documents of 1 to 6 keys without text, from which the base
    model learns in little time what a question is.
    """
    from ltrain.data.store import write_store
    from ltrain.data.tokenizer import byte_tokenizer

    root = Path(sysconfig.get_paths()["stdlib"])
    text = np.concatenate(
        [np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(root.glob("*.py"))]
    ).astype(np.int32)
    text = text[(text < STATED) & ((text >= 32) | (text == 10))]
    rng = np.random.default_rng(seed)

    def documents() -> Any:
        for number in range(count + drills):
            if number < count:
                plain, keys = length - KEYS * (1 + 2 * questions), np.arange(KEYS)
            else:
                plain, keys = 0, rng.permutation(KEYS)[: rng.integers(1, KEYS - 1)]
            start = int(rng.integers(len(text) - plain))
            document = weave(text[start : start + plain], keys, questions, rng)
            digest = hashlib.sha256(document.tobytes()).digest()
            yield int.from_bytes(digest[:8], "big"), document

    facts = {"source": "standard library with facts", "left_out": {}}
    write_store(folder, documents(), byte_tokenizer(), facts=facts)


def weave(text: np.ndarray, keys: np.ndarray, questions: int, rng: np.random.Generator) -> np.ndarray:
    """The text with statements and questions at random places, a key's statement before its questions."""
    at, tokens = [], []
    # Places by fractions, so that ties and empty texts keep the order too.
    places = np.sort(rng.random((len(keys), 1 + questions)), axis=1)
    for key, own in zip(keys, places, strict=True):
        value = int(rng.integers(VALUES))
        at += own.tolist()
        tokens.append([STATED + VALUES * key + value])
        tokens += [[ASKED + key, ANSWERED + value]] * questions
    order = np.argsort(at)
    where = np.concatenate([np.full(len(tokens[i]), int(at[i] * (len(text) + 1))) for i in order])
    return np.insert(text, where, np.concatenate([tokens[i] for i in order])).astype(np.int32)


def tree(out: Path, name: str, options: dict[str, Any], seed: int, store: str) -> dict[str, Any]:
    """The configuration that all runs share."""
    return {
        "run": {"name": name, "output": str(out / "runs"), "seed": seed},
        "data": {
            "sources": [{"kind": "tokens", "path": str(out / f"{store}-{seed}")}],
            "packing": "none" if store == "long" else "concat_split",
            "max_document_tokens": LONG if store == "long" else SHORT,
            "holdout": 0.06,
        },
        "checkpoint": {"every": 0, "resume": False, "export": store != "long"},
        "metrics": {"console": "quiet", "tensorboard": False, "wandb": "off"},
        **options,
    }


def base_tree(out: Path, seed: int, steps: int, ranks: int) -> dict[str, Any]:
    options = {
        "model": {
            **{"kind": "new", "family": "llama", "hidden_size": 128, "num_layers": 3, "num_heads": 4},
            **{"num_kv_heads": 4, "ffn_hidden_size": 320, "max_position_embeddings": SHORT},
            **{"rope_theta": 10000.0, "tie_embeddings": True},
        },
        "train": {
            **{"seq_len": 4 * SHORT, "tokens_per_step": 4 * SHORT * ranks, "steps": steps, "dtype": "fp32"},
            **{"timeout_s": 300},
        },
        "optimizer": {"kind": "adamw", "lr": 4e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup_steps": min(20, steps), "min_lr_ratio": 0.1},
        "parallel": {"context": {"schedule": "ring", "block": 128}},
        "eval": {"at_start": False, "at_end": False, "max_tokens": 0},
    }
    return tree(out, f"base-{seed}", options, seed, "short")


def arm_tree(out: Path, pattern: str, seed: int, steps: int) -> dict[str, Any]:
    options = {
        "model": {"kind": "hf", "path": str(out / "runs" / f"base-{seed}" / "hf")},
        "rope": {"kind": "yarn", "factor": LONG // SHORT},
        "train": {
            **{"seq_len": LONG, "tokens_per_step": 2 * LONG, "steps": steps, "dtype": "fp32"},
            "timeout_s": 300,
        },
        "optimizer": {"kind": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "warmup_steps": min(4, steps), "min_lr_ratio": 0.1},
        "parallel": {"context": {"schedule": "ring", "block": BLOCK}},
        "attention": {"pattern": PATTERNS.get(pattern, {"kind": "dense"})},
        "elimination": ELIMINATION.get(pattern, {"kind": "none"}),
        "eval": {"at_start": False, "at_end": False, "max_tokens": 32 * LONG},
    }
    return tree(out, f"{pattern}-{seed}", options, seed, "long")


def run_arm(out: Path, pattern: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one arm and evaluate it: the row of the table."""
    import torch

    from ltrain.config.load import validate
    from ltrain.metrics.sinks import read_metrics
    from ltrain.parallel.mesh import init_process_group
    from ltrain.train.build import build_run
    from ltrain.train.evaluate import evaluate, position_buckets
    from ltrain.train.main import set_seed
    from ltrain.train.trainer import Trainer

    torch.set_num_threads(1)
    config = validate(arm_tree(out, pattern, seed, steps))
    init_process_group(300)
    set_seed(seed)
    run = build_run(config)
    began = time.perf_counter()
    trainer = Trainer(config, run)
    while run.step < steps:
        trainer.one_step()
    seconds = time.perf_counter() - began
    trainer.measure.close()
    ends = position_buckets(LONG, (128, 512, 1024, 2048))
    held_out = evaluate(run.ddp, run.mesh, run.held_out, ends, run.assignment)
    records = read_metrics(run.folder / "metrics.jsonl")
    return {
        "pattern": pattern,
        "seed": seed,
        "steps": steps,
        "fields": ELIMINATION.get(pattern) or PATTERNS[pattern],
        "train_s": seconds,
        "density": records[-1].get("sparse/density", 1.0),
        "curve": [r["train/loss"] for r in records if "train/loss" in r],
        "loss": held_out.loss,
        "by_position": dict(zip(map(str, ends), held_out.losses, strict=True)),
        "recall": recall(run),
    }


def recall(run: Any) -> dict[str, list[float]]:
    """By distance to the nearest earlier place that tells the value: answers, those given over 1/2, nats."""
    from ltrain.train.step import run_model

    asked, right, lost = (np.zeros(len(DISTANCES)) for _ in range(3))

    def count(batch: Any, nll: Any) -> None:
        tokens, labels = batch.tokens[0].numpy(), batch.labels[0].numpy()
        last: dict[int, int] = {}
        for at, token in enumerate(tokens.tolist()):
            if STATED <= token < STATED + KEYS * VALUES:
                last[(token - STATED) // VALUES] = at
            elif ASKED <= token < ASKED + KEYS and labels[at] >= 0:
                key = token - ASKED
                bucket = int(np.searchsorted(DISTANCES, at - last[key]))
                asked[bucket] += 1
                right[bucket] += float(nll[at]) < np.log(2)
                lost[bucket] += float(nll[at])
                last[key] = at + 1

    run.ddp.eval()
    for row in run.held_out:
        run_model(run.ddp, run.mesh, run.assignment.batches([row]), train=False, on_losses=count)
    run.ddp.train()
    return {"asked": asked.tolist(), "right": right.tolist(), "nll": lost.tolist()}


def start(command: list[str], log: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("w") as file:
        subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=True)


def make_documents(out: Path, seed: int) -> None:
    if not (out / f"short-{seed}").exists():
        write_documents(out / f"short-{seed}", seed, 7000, SHORT, 6, drills=30000)
    if not (out / f"long-{seed}").exists():
        write_documents(out / f"long-{seed}", 1000 + seed, 500, LONG, 4)


def make_base(out: Path, seed: int, steps: int, ranks: int) -> None:
    """The base model of a seed, trained by `ranks` data-parallel processes."""
    import yaml

    if (out / "runs" / f"base-{seed}" / "hf" / "config.json").exists():
        return
    path = out / f"base-{seed}.yaml"
    path.write_text(yaml.safe_dump(base_tree(out, seed, steps, ranks)))
    script = Path(__file__).parents[2] / "launch" / "train.py"
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    start([*run, str(script), str(path)], out / f"base-{seed}.log")


def run_all(options: argparse.Namespace) -> int:
    """Base models first, side by side; then all arms on `workers` processes, dense ones first."""
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(options.seeds)
    ranks = options.base_ranks or max(1, options.workers // options.seeds)
    began = time.perf_counter()
    for seed in seeds:  # one after the other: transformers cannot be imported by two threads at once
        make_documents(out, seed)
    with ThreadPoolExecutor(options.seeds) as pool:
        list(pool.map(lambda seed: make_base(out, seed, options.base_steps, ranks), seeds))
    print(f"base models: {time.perf_counter() - began:.0f} s", flush=True)
    slow = ("dense", "nsa", "longgen", "xattention")
    order = sorted(options.patterns, key=lambda p: slow.index(p) if p in slow else len(slow))
    jobs = [(p, s) for p in order for s in seeds if not (out / f"{p}-{s}.json").exists()]

    def job(arm: tuple[str, int]) -> str | None:
        pattern, seed = arm
        command = [sys.executable, __file__, "arm", "--out", str(out), "--pattern", pattern]
        try:
            start(
                [*command, "--seed", str(seed), "--steps", str(options.steps)], out / f"{pattern}-{seed}.log"
            )
        except subprocess.CalledProcessError:
            return f"{pattern}, seed {seed}: see {out / f'{pattern}-{seed}.log'}"
        return None

    with ThreadPoolExecutor(options.workers) as pool:
        failed = [text for text in pool.map(job, jobs) if text]
    print(f"{len(jobs) - len(failed)} arms, {time.perf_counter() - began:.0f} s in all", flush=True)
    for text in failed:
        print(text, file=sys.stderr)
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    run.add_argument("--out", type=Path, required=True)
    run.add_argument("--seeds", type=int, default=2)
    run.add_argument("--base-steps", type=int, default=400)
    run.add_argument("--base-ranks", type=int, help="processes of a base run (workers / seeds)")
    run.add_argument("--steps", type=int, default=36, help="of 8,192 tokens")
    run.add_argument("--patterns", nargs="+", choices=ARMS, default=ARMS)
    arm = commands.add_parser("arm")
    arm.add_argument("--out", type=Path, required=True)
    arm.add_argument("--pattern", choices=ARMS, required=True)
    arm.add_argument("--seed", type=int, required=True)
    arm.add_argument("--steps", type=int, required=True)
    report = commands.add_parser("report")
    report.add_argument("folder", type=Path)
    report.add_argument("--docs", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    if options.command == "run":
        return run_all(options)
    if options.command == "arm":
        row = run_arm(options.out, options.pattern, options.seed, options.steps)
        path = options.out / f"{options.pattern}-{options.seed}.json"
        path.with_suffix(".tmp").write_text(json.dumps(row))
        path.with_suffix(".tmp").replace(path)
        return 0
    from pattern_quality_report import write_report

    write_report(options.folder, options.docs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
