"""What token elimination costs: a small byte model trained short, extended 4x by every arm, evaluated dense.

    python tools/bench/elimination_quality.py --workers 16 --out DIR      # runs what DIR doesn't hold yet
    ltrain report --elimination DIR                                       # table and plot

For every seed a model is trained at 256 tokens, then on at 1,024 (linear position interpolation) by every
arm, each a run of the trainer: same start, data, number of tokens. All arms are evaluated without
elimination, on held-out text and on a recall task: eight keys with their values, control characters that no
source uses, stand anywhere in text, and every key is asked for once at the end of the document. Dense
training of as many bytes, random and recent blocks are controls that arXiv 2501.09767 lacks. Every arm is
one thread and writes one JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import sysconfig
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

SHORT, LONG = 256, 1024
LAYERS, HIDDEN, HEADS, KV_HEADS, FFN, BLOCK = 6, 96, 4, 2, 256, 16
RATIO, SPARSE = 0.4, (2, 3, 4)
# One byte a key and a value, tab and line breaks left out.
KEYS = [chr(14 + i) for i in range(8)]
VALUES = [chr(1 + i) for i in range(8)]
# The share of the long sequence whose dense training saves as many bytes as `qkv` on all of it, at
# memory.level mlp: 2 residual inputs of the hidden size, and q, k, v, out of attention.
_ATTENTION = HIDDEN + 2 * HIDDEN + 2 * HIDDEN * KV_HEADS // HEADS
_BYTES = 1 - len(SPARSE) / LAYERS * (1 - RATIO) * _ATTENTION / (_ATTENTION + HIDDEN)
EQUAL_BYTES = int(_BYTES * LONG) // BLOCK * BLOCK


def blocks(mode: str = "qkv", scorer: str = "pooled", **fields: Any) -> dict[str, Any]:
    ratios = [RATIO if layer in SPARSE else 1.0 for layer in range(LAYERS)]
    return {
        "kind": "blocks", "mode": mode, "ratio": ratios, "strata": 4, "scorer": {"kind": scorer}, **fields
    }  # fmt: skip


ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    f"dense, {EQUAL_BYTES} tokens (equal bytes)": {"seq_len": EQUAL_BYTES},
    "qkv, pooled": {"elimination": blocks()},
    "qkv, pooled from tokens": {"elimination": blocks(scorer="pooled")},
    "qkv, lemo": {"elimination": blocks(scorer="lemo")},
    "qkv, predictor": {"elimination": blocks(scorer="predictor")},
    "qkv, random": {"elimination": blocks(scorer="random")},
    "qkv, recency": {"elimination": blocks(scorer="recency")},
    "qkv, pooled, annealed": {"elimination": blocks(anneal=0.2)},
    "qkv, random, annealed": {"elimination": blocks(scorer="random", anneal=0.2)},
    "q, pooled": {"elimination": blocks("q")},
    "q, random": {"elimination": blocks("q", "random")},
    "layer, pooled": {"elimination": blocks("layer")},
    "layer, random": {"elimination": blocks("layer", "random")},
    "backward, pooled": {"elimination": blocks("backward")},
    "backward, random": {"elimination": blocks("backward", "random")},
}
ARMS["qkv, pooled from tokens"]["elimination"]["scorer"]["pool"] = "tokens"


def write_data(folder: Path, tiny: bool) -> None:
    """Text of the standard library and recall documents, in training and test halves."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [file.read_bytes().decode("ascii", "ignore") for file in files]
    texts = ["".join(c for c in text if c >= " " or c in "\t\n") for text in texts]
    texts = [text for text in texts if len(text) > 4 * LONG]
    test, train = texts[::12], [text for i, text in enumerate(texts) if i % 12]
    rng = random.Random(0)

    def dump(name: str, documents: list[str]) -> None:
        (folder / name).write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))

    for size in (SHORT, EQUAL_BYTES, LONG):
        count = (300 if tiny else 24000) * SHORT // size
        # The base model learns to recall from short documents that ask three times, and from drills.
        asks, drills = (3, count) if size == SHORT else (1, 0)
        recall = [recall_document(rng, train, size, asks) for _ in range(count)]
        recall += [drill(rng) for _ in range(drills)]
        rng.shuffle(recall)
        dump(f"recall-{size}.jsonl", recall)
        chunks = [text[at : at + size - 2] for text in train for at in range(0, len(text) - size, size)]
        rng.shuffle(chunks)
        dump(f"text-{size}.jsonl", chunks[: 200 if tiny else 20000])
    windows = [text[at : at + LONG - 2] for text in test for at in range(0, len(text) - LONG, LONG)]
    rng.shuffle(windows)
    dump("test-text.jsonl", windows[: 8 if tiny else 96])
    dump("test-recall.jsonl", [recall_document(rng, test, LONG) for _ in range(8 if tiny else 96)])
    (folder / "done").touch()


def recall_document(rng: random.Random, texts: list[str], size: int, asks: int = 1) -> str:
    """Each key and its value at a random place of a text, then `asks` times all keys and values in random
    order; of `size` tokens with the special ones at the ends.
    """
    pairs = [key + rng.choice(VALUES) for key in KEYS]
    asked = "".join("".join(rng.sample(pairs, len(pairs))) for _ in range(asks))
    room = size - 2 - len(asked) - 2 * len(pairs)
    text = rng.choice(texts)
    start = rng.randrange(len(text) - room)
    cuts = sorted(rng.randrange(room + 1) for _ in pairs)
    parts = [text[start : start + room][a:b] for a, b in zip([0, *cuts], [*cuts, room], strict=True)]
    stated = [*rng.sample(pairs, len(pairs)), ""]
    return "".join(part + pair for part, pair in zip(parts, stated, strict=True)) + asked


def drill(rng: random.Random) -> str:
    """Keys and their values over and over, without text: what a base model learns to recall from."""
    pairs = [key + rng.choice(VALUES) for key in KEYS]
    return "".join("".join(rng.sample(pairs, len(pairs))) for _ in range(4))


def config_tree(args: argparse.Namespace, name: str, seed: int, size: int, **changes: Any) -> dict[str, Any]:
    data = args.out / "data"
    sources = [{"kind": "jsonl", "path": str(data / f"{kind}-{size}.jsonl")} for kind in ("text", "recall")]
    tree = {
        "run": {"name": name, "output": str(args.out / "runs"), "seed": seed},
        "data": {
            "sources": sources,
            "cache": str(args.out / "cache"),
            "holdout": 0.0,
            "max_document_tokens": size,
        },
        "parallel": {"context": {"schedule": "ring", "block": BLOCK}},
        "checkpoint": {"every": 0, "asynchronous": False, "resume": False},
        "metrics": {"console": "quiet", "every": 10},
        "eval": {"max_tokens": 0},
    }
    return tree | changes


def pretrain(args: argparse.Namespace, seed: int) -> None:
    """The model that all arms of a seed start from."""
    name = f"base-{seed}"
    if (args.out / "runs" / name / "hf" / "config.json").exists():
        return
    model = {
        "kind": "new", "family": "llama", "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS,
        "num_kv_heads": KV_HEADS, "ffn_hidden_size": FFN, "max_position_embeddings": SHORT,
        "tie_embeddings": True,
    }  # fmt: skip
    steps = 4 if args.tiny else args.pretrain_steps
    tree = config_tree(
        args, name, seed, SHORT, model=model,
        train={"seq_len": LONG, "tokens_per_step": 2 * LONG, "steps": steps, "dtype": "fp32"},
        optimizer={"kind": "adamw", "lr": args.pretrain_lr, "betas": [0.9, 0.95]},
        schedule={"kind": "cosine", "warmup_steps": max(1, steps // 20)},
    )  # fmt: skip
    run_training(tree, args, args.pretrain_threads)


def run_arm(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """Extend the seed's model by an arm, evaluate it, write its JSON."""
    path = args.out / f"{arm.replace(', ', '-').replace(' ', '_')}-{seed}.json"
    if path.exists():
        return path
    settings = ARMS[arm]
    size = settings.get("seq_len", LONG)
    per_step = max(1, round(args.rows * LONG / size))
    steps = 3 if args.tiny else round(args.steps * args.rows * LONG / (per_step * size))
    tree = config_tree(
        args, path.stem.replace("(", "").replace(")", ""), seed, size,
        model={"kind": "hf", "path": str(args.out / "runs" / f"base-{seed}" / "hf")},
        rope={"kind": "linear", "factor": LONG / SHORT},
        train={"seq_len": size, "tokens_per_step": per_step * size, "steps": steps, "dtype": "fp32"},
        optimizer={"kind": "adamw", "lr": args.lr, "betas": [0.9, 0.95]},
        schedule={"kind": "cosine", "warmup_steps": max(1, steps // 20)},
        memory={"level": "mlp"},
        elimination=settings.get("elimination", {"kind": "none"}),
    )  # fmt: skip
    tree["checkpoint"]["export"] = False
    section = dict(tree["elimination"])
    if section.get("scorer") == {"kind": "predictor"}:
        folder = args.out / "predictors" / str(seed)
        fit_predictor(tree | {"elimination": {"kind": "none"}}, folder, 4 if args.tiny else 150)
        tree["elimination"] = section | {"scorer": {"kind": "predictor", "path": str(folder)}}
    began = time.process_time()
    result = run_training(tree, args, 1)
    result |= {"arm": arm, "seed": seed, "cpu_seconds": time.process_time() - began, "steps": steps}
    path.write_text(json.dumps(result))
    return path


def fit_predictor(tree: dict[str, Any], folder: Path, steps: int) -> None:
    """Fit the learned scorer to the seed's model, extended in position only."""
    import torch

    from ltrain.config.load import validate
    from ltrain.elimination.fit import FitSettings
    from ltrain.parallel.mesh import init_process_group
    from ltrain.train.build import build_run
    from ltrain.train.elimination import fit_to_run
    from ltrain.train.main import set_seed

    torch.set_num_threads(1)
    config = validate(tree)
    init_process_group(600)
    set_seed(config.run.seed)
    fit_to_run(build_run(config), BLOCK, steps=steps, out=folder, settings=FitSettings(prune_every=50))


def run_training(tree: dict[str, Any], args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Train as the trainer does; returns dense held-out losses, recall, bytes and FLOPs."""
    import torch

    from ltrain.config.load import validate
    from ltrain.metrics.sinks import read_metrics
    from ltrain.parallel.mesh import init_process_group
    from ltrain.train.build import build_run
    from ltrain.train.main import export_run, set_seed
    from ltrain.train.plan import write_config
    from ltrain.train.trainer import Trainer

    torch.set_num_threads(threads)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        if "memory" in tree and not _has_memory():
            tree.pop("memory")
        config = validate(tree)
        init_process_group(600)
        set_seed(config.run.seed)
        run = build_run(config)
        write_config(config, run.folder)
        code = Trainer(config, run).train()
        assert code == 0, code
        if config.checkpoint.export:
            export_run(run, run.folder / "hf")
            return {}
        records = [r for r in read_metrics(run.folder / "metrics.jsonl") if "train/loss" in r]
        last = records[-1]
        seen = [r for r in records if "elim/kept_frac" in r and r["elim/kept_frac"] < 1] or [last]
        outcome = {
            "saved_bytes_per_token_layer": saved_bytes(run),
            "tflop": sum(r["perf/tflops_executed_per_gpu"] * r["perf/step_time_s"] for r in records)
            / len(records) * config.train.steps,
            "kept_frac": seen[0].get("elim/kept_frac", 1.0),
            "captured_mass": seen[0].get("elim/captured_mass"),
            "train_loss": [[r["step"], r["train/loss"]] for r in records],
            **evaluate(run, args.out / "data"),
        }  # fmt: skip
    return outcome


def _has_memory() -> bool:
    from ltrain.config.schema import RunConfig

    return "memory" in RunConfig.model_fields


def micro_batch(run: Any, text: str) -> Any:
    from ltrain.data.rows import Row

    tokens = run.tokenizer.encode(text)
    return run.assignment.batches([Row(tokens, (len(tokens),))])[0]


def saved_bytes(run: Any) -> float:
    """Bytes that the decoder layers save for the backward pass of one training row, a token and layer."""
    import torch

    parameters = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    batch = micro_batch(run, "x" * (run.config.train.seq_len - 2))
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
    return sum(seen.values()) / batch.tokens.shape[1] / LAYERS


def evaluate(run: Any, data: Path) -> dict[str, float]:
    """Dense held-out loss of text (nats a byte; also of the last quarter), and recall of values by key."""
    import torch
    import torch.nn.functional as F

    run.model.eval()
    totals = {"text": [0.0, 0], "text_last_quarter": [0.0, 0], "recall": [0.0, 0]}
    right = asked = 0
    for kind in ("text", "recall"):
        for line in (data / f"test-{kind}.jsonl").read_text().splitlines():
            text = json.loads(line)["text"]
            batch = micro_batch(run, text)
            with torch.no_grad():
                logits = run.model(
                    input_ids=batch.tokens, position_ids=None, attention_mask=None,
                    packed_seq_params=batch.context,
                )[0]  # fmt: skip
            targets = batch.tokens[0, 1:]
            nll = F.cross_entropy(logits[:-1].float(), targets, reduction="none")
            if kind == "text":
                spans = {"text": nll, "text_last_quarter": nll[3 * len(nll) // 4 :]}
            else:
                # The last pairs ask; target i is token i + 1.
                shift = 0 if run.tokenizer.bos_id is None else 1
                where = torch.arange(len(text) - 2 * len(KEYS) + 1, len(text), 2) + shift - 1
                hit = (logits[:-1].argmax(-1) == targets)[where]
                right, asked = right + int(hit.sum()), asked + len(hit)
                spans = {"recall": nll[where]}
            for name, values in spans.items():
                totals[name][0] += float(values.double().sum())
                totals[name][1] += len(values)
    losses = {f"{name}_loss": total / count for name, (total, count) in totals.items()}
    return losses | {"recall_accuracy": right / asked}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-steps", type=int, default=800)
    parser.add_argument("--pretrain-lr", type=float, default=4e-3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=4, help="rows of 1,024 tokens in a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--only", default="", help="arms whose name contains this")
    parser.add_argument("--tiny", action="store_true", help="a few steps: whether it runs")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.pretrain_threads = max(1, args.workers // args.seeds)
    os.environ["OMP_NUM_THREADS"] = str(args.pretrain_threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # A build of its own: a lock that a killed process left in the shared cache would wait for ever.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(args.out / "extensions"))
    write_data(args.out / "data", args.tiny)
    from ltrain_kernels.block_sparse import cpu

    cpu.extension_loaded()  # compiled once here, where it can be, not by all workers
    seeds = range(1, args.seeds + 1)
    arms = [arm for arm in ARMS if args.only in arm]
    began = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        for done in [pool.submit(pretrain, args, seed) for seed in seeds]:
            done.result()
        print(f"{args.seeds} base models after {time.perf_counter() - began:.0f} s", flush=True)
        jobs: list[Future[Path]] = [pool.submit(run_arm, args, arm, seed) for arm in arms for seed in seeds]
        for job in jobs:
            found = json.loads(job.result().read_text())
            print(
                f"{time.perf_counter() - began:5.0f} s  {found['arm']:36} seed {found['seed']}  text "
                f"{found['text_loss']:.4f}  recall {found['recall_accuracy']:.3f}  in "
                f"{found['cpu_seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
