"""Time of a step with token elimination, beside what its FLOPs predict.

    python tools/bench/elimination.py [--tokens 16384] [--ratio 0.4] [--mode qkv] [--scorer pooled]

One process trains a small model on one sequence, dense and with half of its layers sparse, by turns. The
prediction is the quotient of executed FLOPs (`ltrain.model.flops`), in which scoring isn't counted; 1.0 means
that elimination saves all the time that its arithmetic allows. Times are (wall, processor) seconds: on a
machine that others use too, take one thread (OMP_NUM_THREADS=1) and the latter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from ltrain.config.load import validate
from ltrain.model.flops import step_flops
from ltrain.parallel.mesh import init_process_group
from ltrain.train.build import build_language_model, build_run
from ltrain.train.elimination import build_elimination
from ltrain.train.main import set_seed


def tree(args: argparse.Namespace, elimination: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": {"name": "bench", "output": "/tmp/ltrain-bench"},
        "model": {
            "kind": "new", "hidden_size": args.hidden, "num_layers": args.layers,
            "num_heads": args.hidden // 64, "num_kv_heads": args.hidden // 64,
            "ffn_hidden_size": args.hidden * 43 // 16,
            "max_position_embeddings": args.tokens,
        },
        "data": {"sources": [{"kind": "text_tree", "path": "stdlib"}], "document_mask": False},
        "train": {
            "seq_len": args.tokens, "tokens_per_step": args.tokens, "steps": 2 * args.repeats + 2,
            "dtype": "fp32",
        },
        "parallel": {"context": {"schedule": "ring", "block": 128}},
        "memory": {"level": args.level},
        "metrics": {"console": "quiet"},
        "eval": {"max_tokens": 0},
        "elimination": elimination,
    }  # fmt: skip


def step(model: Any, batch: Any) -> tuple[float, float]:
    """Wall and processor seconds of a forward and backward pass."""
    began = time.perf_counter(), time.process_time()
    out = model(
        input_ids=batch.tokens, position_ids=None, attention_mask=None, labels=batch.labels,
        packed_seq_params=batch.context,
    )  # fmt: skip
    out[0].backward()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--mode", default="qkv")
    parser.add_argument("--scorer", default="pooled")
    parser.add_argument("--level", default="none", help="memory.level")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    ratios = [args.ratio if layer % 2 else 1.0 for layer in range(args.layers)]
    sparse = {
        "kind": "blocks", "mode": args.mode, "ratio": ratios, "strata": 4, "scorer": {"kind": args.scorer}
    }  # fmt: skip
    init_process_group(600)
    config = validate(tree(args, {"kind": "none"}))
    set_seed(1)
    run = build_run(config)
    other = validate(tree(args, sparse))
    models = {
        "dense": run.model,
        "sparse": build_language_model(other, run.spec, run.mesh, build_elimination(other, run.spec)),
    }
    rows = [run.loader.next_step().rows for _ in range(args.repeats + 1)]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    batch = None
    for number, row in enumerate(rows):
        for name, model in models.items():
            batch = run.assignment.batches(row)[0]
            model.train()
            for p in model.parameters():
                p.grad = None
            seconds = step(model, batch)
            if number:
                times[name].append(seconds)
    assert batch is not None
    context = batch.context
    kept = [context.eliminated.get(layer, (1.0,))[0] for layer in range(args.layers)]
    densities = [context.densities.get(layer, 1.0) for layer in range(args.layers)]
    flops = step_flops(run.spec, [args.tokens], densities=densities, kept=kept, mode=args.mode)
    predicted = flops.model / flops.executed
    wall, cpu = (
        statistics.median(t[i] for t in times["dense"]) / statistics.median(t[i] for t in times["sparse"])
        for i in (0, 1)
    )
    print(
        json.dumps(
            {
                "tokens": args.tokens, "mode": args.mode, "scorer": args.scorer, "level": args.level,
                "threads": torch.get_num_threads(), "torch": torch.__version__, "kept": kept,
                "dense_s": [[round(x, 2) for x in t] for t in times["dense"]],
                "sparse_s": [[round(x, 2) for x in t] for t in times["sparse"]],
                "predicted_speedup": round(predicted, 3), "wall_speedup": round(wall, 3),
                "cpu_speedup": round(cpu, 3), "share_of_prediction": round(wall / predicted, 3),
                "cpu_share_of_prediction": round(cpu / predicted, 3),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
