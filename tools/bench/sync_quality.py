"""Quality of the synchronisation methods on a small model: one JSON file an arm and seed.

    python tools/bench/sync_quality.py --workers 16 --out DIR     # resumable
    python tools/bench/sync_quality_report.py DIR

A byte-level GPT on the Python standard library. Two starts: `continued` goes on from weights that data
parallelism has pretrained, which is what ltrain does with a model; `scratch` trains from random weights. All
arms of a start and seed see the same tokens. Replicas are simulated in one thread with the code of a run
(`OuterState`, `Subspace`, `project_writers`); bytes are those of real payloads.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from byte_gpt import (
    HIDDEN,
    Compressed,
    Corpus,
    Model,
    Pretraining,
    cosine_rate,
    evaluate,
    loss_of,
    optimizer_of,
    update,
)

from ltrain.config.sync import DiLoCo, SparseLoCo
from ltrain.parallel.stage_link import Subspace
from ltrain.sync.outer import OuterState


@dataclass(frozen=True)
class Arm:
    """One way to train: the method (None: every-step data parallelism) and which replicas are slow pipelines.

    `model` is `reparametrised` where all replicas have layers that write into the subspace only.
    """

    key: str
    title: str
    config: DiLoCo | SparseLoCo | None = None
    start: Literal["continued", "scratch"] = "continued"
    compressed: tuple[int, ...] = ()
    projected: bool = True
    model: Literal["plain", "reparametrised"] = "plain"
    lr_factor: float = 1.0


def arms(h: int, scratch_h: int) -> list[Arm]:
    def sparse(k: int = 64, bits: int = 1, steps: int = h, **more: Any) -> SparseLoCo:
        fields = {"density": k / 4096, "bits": bits, "aggregation": "senders", "gain": 1.0} | more
        return SparseLoCo(steps_per_round=steps, **fields)

    def tuned(steps: int) -> DiLoCo:
        return DiLoCo(steps_per_round=steps, outer_momentum=0.5, gain=1.0)

    found = [
        Arm("dp", "every step (data parallel)"),
        Arm("diloco", "DiLoCo, momentum 0.5, gain 1", tuned(h)),
        Arm("diloco-published", "DiLoCo, published 0.7 and 0.9", DiLoCo(steps_per_round=h)),
        Arm("sparse-k16", "SparseLoCo k=16", sparse(16)),
        Arm("sparse-k64", "SparseLoCo k=64", sparse()),
        Arm("sparse-k256", "SparseLoCo k=256", sparse(256)),
        Arm("sparse-k64-2bit", "SparseLoCo k=64, 2-bit table", sparse(bits=2)),
        Arm(
            "sparse-k64-published",
            "SparseLoCo k=64, published: 2 bits, mean, rate 1",
            SparseLoCo(steps_per_round=h),
        ),
        Arm("sparse-k64-noef", "SparseLoCo k=64, no error feedback", sparse(error_decay=0.0)),
        Arm("sparse-k64-2h", f"SparseLoCo k=64, H={2 * h}", sparse(steps=2 * h)),
        Arm("sparse-k64-delayed", "SparseLoCo k=64, delayed update", sparse(overlap="delayed")),
    ]
    # Whether the order holds with each method at its own best rate.
    for factor, times in ((2, "twice"), (4, "4 times")):
        found += [
            Arm(f"dp-{factor}lr", f"every step, {times} the learning rate", lr_factor=factor),
            Arm(f"sparse-k64-{factor}lr", f"SparseLoCo k=64, {times} the learning rate", sparse(),
                lr_factor=factor),
            Arm(f"diloco-published-{factor}lr", f"DiLoCo, published, {times} the learning rate",
                DiLoCo(steps_per_round=h), lr_factor=factor),
        ]  # fmt: skip
    slow = sparse(steps=scratch_h)
    scratch = [
        Arm("s-dp", "every step (data parallel)"),
        Arm("s-diloco", "DiLoCo, momentum 0.5, gain 1", tuned(scratch_h)),
        Arm("s-sparse", "SparseLoCo k=64", slow),
        Arm("s-half", "mixed: links of half the replicas", slow, compressed=(2, 3)),
        Arm("s-all", "all links", slow, compressed=(0, 1, 2, 3)),
        Arm("s-half-lossy", "mixed, writers not projected", slow, compressed=(2, 3), projected=False),
        Arm("s-all-lossy", "all, writers not projected", slow, compressed=(0, 1, 2, 3), projected=False),
        Arm("s-reparametrised", "all links, reparametrised layers", slow, model="reparametrised"),
    ]
    return found + [Arm(**{**vars(arm), "start": "scratch"}) for arm in scratch]


def start_of(arm: Arm, seed: int, args: argparse.Namespace, space: Subspace) -> Model:
    if arm.start == "continued":
        return pretraining(args).load(seed)
    torch.manual_seed(seed)
    return Model(space if arm.model == "reparametrised" else None)


def pretraining(args: argparse.Namespace) -> Pretraining:
    return Pretraining(args.out, args.pretrain_steps, args.pretrain_lr)


def schedule_of(arm: Arm, args: argparse.Namespace) -> tuple[int, float]:
    """Steps and peak learning rate of an arm."""
    if arm.start == "continued":
        return args.continued_steps, args.continued_lr * arm.lr_factor
    return args.scratch_steps, args.scratch_lr * arm.lr_factor


def ring_bytes(model: Model, replicas: int) -> int:
    """What a ring all-reduce in bfloat16 sends from every replica, a step."""
    return round(2 * sum(p.numel() for p in model.parameters()) * 2 * (replicas - 1) / replicas)


def train_every_step(arm: Arm, start: Model, corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    steps, peak = schedule_of(arm, args)
    optimizer, test, curve = optimizer_of(start, peak), corpus.test(), []
    for step in range(steps):
        ids = torch.cat([corpus.batch(step, r, args.sequences) for r in range(args.replicas)])
        loss_of(start, ids).backward()
        update(start, optimizer, cosine_rate(step, steps, peak))
        if (step + 1) % args.eval_every == 0:
            curve.append(evaluate(start, test))
    return {"curve": curve, "bytes_up": ring_bytes(start, args.replicas) * steps}


def train_rounds(
    arm: Arm, start: Model, corpus: Corpus, args: argparse.Namespace, space: Subspace
) -> dict[str, Any]:
    """All replicas in turn; a round every `steps_per_round` steps, and one at the end for what is left."""
    assert arm.config is not None
    steps, peak = schedule_of(arm, args)
    models = [copy.deepcopy(start) for _ in range(args.replicas)]
    optimizers = [optimizer_of(model, peak) for model in models]
    states = [
        OuterState(arm.config, dict(model.named_parameters()), adapts=r in arm.compressed)
        for r, model in enumerate(models)
    ]
    links = [Compressed(space, m, arm.projected) if r in arm.compressed else None
             for r, m in enumerate(models)]  # fmt: skip
    test, curve, nbytes, flight = corpus.test(), [], 0, None

    def restart() -> None:
        for state, link in zip(states, links, strict=True):
            state.reset_parameters()
            if link is not None:
                link.start_round()
                state.restart()

    for state, link in zip(states, links, strict=True):
        if link is not None:
            state.restart()
    view = copy.deepcopy(start)
    seen = Compressed(space, view, arm.projected) if len(arm.compressed) == args.replicas else None
    for step in range(steps):
        for r, (model, link) in enumerate(zip(models, links, strict=True)):
            loss_of(model, corpus.batch(step, r, args.sequences), link).backward()
            update(model, optimizers[r], cosine_rate(step, steps, peak))
            if link is not None:
                link.after_step()
        if (step + 1) % arm.config.steps_per_round == 0 or step + 1 == steps:
            if flight is not None:
                for state in states:
                    state.apply(flight)
            sent = {f"r{r}": state.contribute() for r, state in enumerate(states)}
            nbytes += sum(payload.nbytes for payload in sent["r0"].values()) * (args.replicas - 1)
            if states[0].delayed and step + 1 < steps:
                flight = sent
            else:
                for state in states:
                    state.apply(sent)
                restart()
        if (step + 1) % args.eval_every == 0:
            with torch.no_grad():
                for name, p in view.named_parameters():
                    p.copy_(states[0].theta[name])
            if seen is not None:
                seen.start_round()
            curve.append(evaluate(view, test, seen))
    if len({state.digest() for state in states}) != 1:
        raise RuntimeError(f"{arm.key}: the replicas differ after the last round")
    return {"curve": curve, "bytes_up": nbytes}


def run_arm(arm: Arm, seed: int, args: argparse.Namespace) -> str:
    """Train one arm on one seed and write its file."""
    torch.set_num_threads(1)
    began, cpu = time.perf_counter(), time.process_time()
    corpus, space = Corpus(seed), Subspace(HIDDEN, args.rank, 1234)
    start = start_of(arm, seed, args, space)
    at_start = evaluate(start, corpus.test())
    train = train_every_step if arm.config is None else train_rounds
    row = train(arm, start, corpus, args, *([space] if arm.config is not None else []))
    row |= {"key": arm.key, "title": arm.title, "start_kind": arm.start, "seed": seed, "start": at_start}
    row |= {"cpu_s": time.process_time() - cpu, "settings": settings(args)}
    path = args.out / f"{arm.key}-{seed}.json"
    path.with_suffix(".tmp").write_text(json.dumps(row))
    path.with_suffix(".tmp").replace(path)
    return f"{arm.key} seed {seed}: {row['curve'][-1]:.4f} ({time.perf_counter() - began:.0f} s)"


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides an arm's result; a file with other settings is not taken over."""
    skipped = {"workers", "out", "only", "seeds", "first_seed"}
    return {name: value for name, value in vars(args).items() if name not in skipped}


def is_done(arm: Arm, seed: int, args: argparse.Namespace) -> bool:
    path = args.out / f"{arm.key}-{seed}.json"
    return path.exists() and json.loads(path.read_text())["settings"] == settings(args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", default="", help="keys of arms, by comma")
    parser.add_argument("--continued-steps", type=int, default=900)
    parser.add_argument("--scratch-steps", type=int, default=500)
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    parser.add_argument("--h", type=int, default=15, help="local steps a round")
    parser.add_argument("--scratch-h", type=int, default=5, help="the same from random weights")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8, help="of 64 bytes, a replica and step")
    parser.add_argument("--continued-lr", type=float, default=5e-4)
    parser.add_argument("--scratch-lr", type=float, default=2e-3)
    parser.add_argument("--pretrain-lr", type=float, default=4e-3)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16, help="of the stage links, of 128")
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    chosen = [arm for arm in arms(args.h, args.scratch_h) if not args.only or arm.key in args.only.split(",")]
    todo = [(arm, seed) for arm in chosen for seed in seeds if not is_done(arm, seed, args)]
    began = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=spawn) as pool:
        starts: dict[int, Future[str]] = {}
        for seed in sorted({seed for arm, seed in todo if arm.start == "continued"}):
            if not pretraining(args).path(seed).exists():
                starts[seed] = pool.submit(pretraining(args).run, seed)
        jobs = [pool.submit(run_arm, arm, seed, args) for arm, seed in todo if arm.start == "scratch"]
        for start in starts.values():
            print(start.result(), flush=True)
        jobs += [pool.submit(run_arm, arm, seed, args) for arm, seed in todo if arm.start == "continued"]
        for job in as_completed(jobs):
            print(f"{time.perf_counter() - began:5.0f} s: {job.result()}", flush=True)


if __name__ == "__main__":
    main()
