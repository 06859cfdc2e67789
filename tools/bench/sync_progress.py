"""Loss by step for local steps a round and density, beside every-step training: what a local step is worth.

    python tools/bench/sync_progress.py --out FILE.csv --folder DIR      # resumable
    python tools/bench/sync_progress_fit.py FILE.csv                     # the constants of the planner

Continued training of the model of byte_gpt.py at a constant learning rate, so that steps to a loss depend on
no planned end. Replicas are simulated in one thread with `OuterState`. A row holds the held-out loss of the
global parameters after rounds; what is in the file is not trained again.
"""

from __future__ import annotations

import argparse
import copy
import csv
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from byte_gpt import (
    Corpus,
    Model,
    Pretraining,
    constant_rate,
    evaluate,
    loss_of,
    optimizer_of,
    update,
)

from ltrain.config.sync import SparseLoCo
from ltrain.sync.outer import OuterState

COLUMNS = ("steps_per_round", "k", "bits", "replicas", "seed", "lr", "curve")


@dataclass(frozen=True)
class Run:
    """One training; `steps_per_round` 0 is every-step data parallelism, k entries of a chunk of 4096."""

    steps_per_round: int
    k: int
    bits: int
    replicas: int
    seed: int
    lr: float

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(value) for value in vars(self).values())


def train(run: Run, start: Model, args: argparse.Namespace) -> list[tuple[int, float]]:
    """(step, held-out loss) from the start to the target or the last step."""
    corpus = Corpus(run.seed)
    test, curve = corpus.test(), [(0, evaluate(start, corpus.test()))]
    view = copy.deepcopy(start)
    if not run.steps_per_round:
        models, states = [start], []
    else:
        models = [copy.deepcopy(start) for _ in range(run.replicas)]
        config = SparseLoCo(
            steps_per_round=run.steps_per_round,
            density=run.k / 4096,
            bits=run.bits,  # type: ignore[arg-type]
            aggregation="senders",
            gain=1.0,
        )
        states = [OuterState(config, dict(model.named_parameters())) for model in models]
    optimizers = [optimizer_of(model, run.lr) for model in models]
    every = -(-args.eval_every // max(1, run.steps_per_round)) * max(1, run.steps_per_round)
    for step in range(args.steps):
        batches = [corpus.batch(step, r, args.sequences) for r in range(run.replicas)]
        for model, optimizer, ids in zip(
            models, optimizers, batches if states else [torch.cat(batches)], strict=True
        ):
            loss_of(model, ids).backward()
            update(model, optimizer, constant_rate(step, run.lr))
        if states and (step + 1) % run.steps_per_round == 0:
            sent = {f"r{r}": state.contribute() for r, state in enumerate(states)}
            for state in states:
                state.apply(sent)
                state.reset_parameters()
        if (step + 1) % every == 0:
            view.load_state_dict(models[0].state_dict())
            curve.append((step + 1, evaluate(view, test)))
            if curve[-1][1] <= args.target:
                break
    return curve


def work(run: Run, pretraining: Pretraining, args: argparse.Namespace) -> tuple[Run, list[tuple[int, float]]]:
    torch.set_num_threads(1)
    return run, train(run, pretraining.load(run.seed), args)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="CSV, appended to")
    parser.add_argument("--folder", type=Path, required=True, help="of the pretrained weights")
    parser.add_argument(
        "--grid",
        default="0:64,1:64,5:64,15:64,30:64,60:64,15:16,15:256,5:16,5:256",
        help="H:k by comma, H 0 for every-step training",
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--workers", type=int, default=1, help="processes, one thread each")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8, help="of 64 bytes, a replica and step")
    parser.add_argument("--bits", type=int, default=1)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--target", type=float, default=1.49, help="held-out loss at which a run ends")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--eval-every", type=int, default=10)
    args = parser.parse_args()
    pretraining = Pretraining(args.folder)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for seed in seeds:
        if not pretraining.path(seed).exists():
            print(pretraining.run(seed), flush=True)
    done = set()
    if args.out.exists():
        with args.out.open(newline="") as file:
            done = {tuple(row[name] for name in COLUMNS[:-1]) for row in csv.DictReader(file)}
    grid = [tuple(map(int, pair.split(":"))) for pair in args.grid.split(",")]
    runs = [Run(h, k, args.bits, args.replicas, seed, args.lr) for seed in seeds for h, k in grid]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        jobs = [pool.submit(work, run, pretraining, args) for run in runs if run.key not in done]
        for job in as_completed(jobs):
            run, curve = job.result()
            fresh = not args.out.exists()
            with args.out.open("a", newline="") as file:
                out = csv.writer(file, lineterminator="\n")
                if fresh:
                    out.writerow(COLUMNS)
                out.writerow([*run.key, " ".join(f"{step}:{loss:.4f}" for step, loss in curve)])
            print(run, curve[-1], flush=True)


if __name__ == "__main__":
    main()
