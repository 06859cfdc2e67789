"""What token elimination costs: the model of the pattern study extended 8x by every arm, evaluated dense.

    python tools/bench/elimination_quality.py --workers 2 --out DIR       # runs what DIR doesn't hold yet
    ltrain report --elimination DIR                                       # table and plot

Base models, documents, steps and the recall task are those of pattern_quality.py: 512 tokens extended to
4,096 (YaRN), the same start, data and number of tokens for every arm. All arms are evaluated without
elimination. Dense training of as many bytes, random and recent blocks are controls that arXiv 2501.09767
lacks. Every arm is a run of the trainer in a process of one thread and writes one JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pattern_quality as study
from pattern_quality import BLOCK, LONG

HIDDEN, LAYERS, RATIO, SPARSE = 128, 3, 0.4, (1, 2)
# The share of the long sequence whose dense training saves as many bytes as `qkv` on all of it, at
# memory.level mlp: 2 residual inputs of the hidden size, and q, k, v, out of attention without grouped heads.
_BYTES = 1 - len(SPARSE) / LAYERS * (1 - RATIO) * 5 / 6
EQUAL_BYTES = int(_BYTES * LONG) // BLOCK * BLOCK
ENDS = (LONG // 4, LONG // 2, 3 * LONG // 4)


def blocks(mode: str = "qkv", scorer: str = "pooled", **fields: Any) -> dict[str, Any]:
    ratios = [RATIO if layer in SPARSE else 1.0 for layer in range(LAYERS)]
    return {
        "kind": "blocks", "mode": mode, "ratio": ratios, "strata": 4, "scorer": {"kind": scorer}, **fields
    }  # fmt: skip


EQUAL = f"dense, {EQUAL_BYTES} tokens (equal bytes)"
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "none"},
    EQUAL: {"kind": "none"},
    "qkv, pooled": blocks(),
    "qkv, random": blocks(scorer="random"),
    "qkv, lemo": blocks(scorer="lemo"),
    "qkv, predictor": blocks(scorer="predictor"),
    "qkv, recency": blocks(scorer="recency"),
    "qkv, pooled, annealed": blocks(anneal=0.2),
    "qkv, random, annealed": blocks(scorer="random", anneal=0.2),
    "layer, pooled": blocks("layer"),
    "layer, random": blocks("layer", "random"),
    "backward, pooled": blocks("backward"),
    "backward, random": blocks("backward", "random"),
    "q, pooled": blocks("q"),
    "q, random": blocks("q", "random"),
}


def arm_tree(args: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """The dense arm of the pattern study, with less memory, elimination, or shorter documents."""
    tree = study.arm_tree(args.out, "dense", seed, args.steps)
    tree["run"]["name"] = f"{_file_name(arm)}-{seed}"
    tree |= {"memory": {"level": "mlp"}, "elimination": ARMS[arm]}
    if arm == EQUAL:
        tree["data"]["sources"] = [{"kind": "tokens", "path": str(args.out / f"shorter-{seed}")}]
        tree["data"]["max_document_tokens"] = EQUAL_BYTES
        rows = round(tree["train"]["tokens_per_step"] / EQUAL_BYTES)
        tree["train"] |= {"seq_len": EQUAL_BYTES, "tokens_per_step": rows * EQUAL_BYTES}
    return tree


def _file_name(arm: str) -> str:
    return arm.replace(", ", "-").replace(" ", "_").replace("(", "").replace(")", "")


def run_arm(args: argparse.Namespace, arm: str, seed: int) -> dict[str, Any]:
    """Extend the seed's model by an arm and evaluate it: the row of the table."""
    import torch

    from ltrain.config.load import validate
    from ltrain.data.loader import held_out_rows, open_corpus
    from ltrain.metrics.sinks import read_metrics
    from ltrain.parallel.mesh import init_process_group
    from ltrain.train.build import build_run
    from ltrain.train.evaluate import evaluate, position_buckets
    from ltrain.train.main import set_seed
    from ltrain.train.trainer import Trainer

    torch.set_num_threads(1)
    tree = arm_tree(args, arm, seed)
    if tree["elimination"].get("scorer") == {"kind": "predictor"}:
        folder = args.out / "predictors" / str(seed)
        fit_predictor(tree | {"elimination": {"kind": "none"}}, folder, args.predictor_steps)
        tree["elimination"] = tree["elimination"] | {"scorer": {"kind": "predictor", "path": str(folder)}}
    config = validate(tree)
    init_process_group(600)
    set_seed(config.run.seed)
    run = build_run(config)
    began = time.process_time()
    trainer = Trainer(config, run)
    while run.step < args.steps:
        trainer.one_step()
    seconds = time.process_time() - began
    trainer.measure.close()
    records = read_metrics(run.folder / "metrics.jsonl")
    # Every arm reads the same held-out documents, also the one that was trained on shorter ones.
    asked = validate(arm_tree(args, "dense", seed))
    run.held_out = held_out_rows(
        asked.data, open_corpus(asked.data, run.tokenizer), seq_len=LONG, max_tokens=asked.eval.max_tokens,
        min_tokens=asked.eval.min_document_tokens,
    )  # fmt: skip
    text = evaluate(run.ddp, run.mesh, run.held_out, position_buckets(LONG, ENDS), run.assignment)
    found = study.recall(run)
    return {
        "arm": arm,
        "seed": seed,
        "steps": args.steps,
        "cpu_seconds": seconds,
        "text_loss": text.loss,
        "text_last_quarter_loss": text.losses[-1],
        "recall_loss": sum(found["nll"]) / sum(found["asked"]),
        "recall_accuracy": sum(found["right"]) / sum(found["asked"]),
        "recall": found,
        "kept_frac": records[0].get("elim/kept_frac", 1.0),
        "captured_mass": records[0].get("elim/captured_mass"),
        "train_loss": [r["train/loss"] for r in records],
        "tflop": sum(r["perf/tflops_executed_per_gpu"] * r["perf/step_time_s"] for r in records),
        "row_tokens": config.train.seq_len,
        "saved_bytes_per_token_layer": saved_bytes(run, config.train.seq_len),
    }


def fit_predictor(tree: dict[str, Any], folder: Path, steps: int) -> None:
    """Fit the learned scorer to the seed's model, extended in position only."""
    from ltrain.config.load import validate
    from ltrain.elimination.fit import FitSettings
    from ltrain.parallel.mesh import init_process_group
    from ltrain.train.build import build_run
    from ltrain.train.elimination import fit_to_run
    from ltrain.train.main import set_seed

    config = validate(tree)
    init_process_group(600)
    set_seed(config.run.seed)
    fit_to_run(build_run(config), BLOCK, steps=steps, out=folder, settings=FitSettings(prune_every=20))


def saved_bytes(run: Any, tokens: int) -> float:
    """Bytes that the decoder layers save for the backward pass of one training row, a token and layer."""
    import torch

    from ltrain.data.rows import Row

    parameters = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    batch = run.assignment.batches([Row(run.held_out[0].tokens[:tokens], (tokens,))])[0]
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    run.model.train()
    if run.elimination is not None:
        run.elimination.step = 0
    embedded = run.model.embedding(batch.tokens, None).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = embedded
        for layer in run.model.decoder.layers:
            out, _ = layer(out, packed_seq_params=batch.context)
    return sum(seen.values()) / tokens / LAYERS


def run_all(args: argparse.Namespace) -> int:
    """Documents and base models first; then all arms that have no result, on `workers` processes."""
    seeds = range(args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        study.make_documents(args.out, seed)
        if not (args.out / f"shorter-{seed}").exists():
            count = 500 * LONG // EQUAL_BYTES
            study.write_documents(args.out / f"shorter-{seed}", 2000 + seed, count, EQUAL_BYTES, 4)
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda seed: study.make_base(args.out, seed, args.base_steps, 1), seeds))

    def job(arm: str, seed: int) -> str | None:
        path = args.out / f"{_file_name(arm)}-{seed}"
        command = [sys.executable, __file__, "--arm", arm, "--seed", str(seed), "--out", str(args.out)]
        numbers = ["--steps", str(args.steps), "--predictor-steps", str(args.predictor_steps)]
        began = time.perf_counter()
        try:
            study.start([*command, *numbers], path.with_suffix(".log"))
        except subprocess.CalledProcessError:
            return f"{arm}, seed {seed}: see {path.with_suffix('.log')}"
        print(f"{arm}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
        return None

    arms = args.arms or list(ARMS)
    jobs = [(a, s) for a in arms for s in seeds if not _result(args.out, a, s).exists()]
    with ThreadPoolExecutor(args.workers) as pool:
        failed = [text for text in pool.map(lambda j: job(*j), jobs) if text]
    for text in failed:
        print(text, file=sys.stderr)
    return 1 if failed else 0


def _result(out: Path, arm: str, seed: int) -> Path:
    return out / "elimination" / f"{_file_name(arm)}-{seed}.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, required=True, help="may be that of pattern_quality.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-steps", type=int, default=3000, help="of 2,048 tokens")
    parser.add_argument("--steps", type=int, default=36, help="of 8,192 tokens")
    parser.add_argument("--predictor-steps", type=int, default=60)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS))
    parser.add_argument("--arm", choices=list(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    if args.arm is None:
        return run_all(args)
    path = _result(args.out, args.arm, args.seed)
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(run_arm(args, args.arm, args.seed)))
    path.with_suffix(".tmp").replace(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
