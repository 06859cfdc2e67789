"""Planned assignment against every static context-parallel degree: real training steps on CPU ranks.

    python tools/bench/planned_cpu.py --ranks 4 --rounds 8 --out planned_cpu

Starts the ranks itself (gloo, one thread each; give it as many free cores and one for the planner). The
documents are the files of the running Python's standard library, in bytes, of at most `--seq-len`. A round
takes one step's rows through every arm, one after the other, in an order that turns by one each round:
planned assignment, and each static degree at which the longest document fits a device, under ring and Ulysses
exchange. All arms share one model, one
optimizer and the same rows; a step is forward, backward, gradient reduction and the optimizer. The planner's
constants are measured by the run itself before the first step, and corrected online from the groups of the
earlier rounds (`--calibrate off`: not); plans are made in the background.

Writes OUT/planned_cpu.json and prints medians, the ratio of each round's pair, and predicted over measured
time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def tree(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The run: planned, with measured constants that are corrected as it goes."""
    heads = args.hidden // 32
    return {
        "run": {"name": "planned_cpu", "output": folder, "seed": args.seed},
        "model": {
            "kind": "new",
            "family": "llama",
            "hidden_size": args.hidden,
            "num_layers": args.layers,
            "num_heads": heads,
            "num_kv_heads": heads,
            "ffn_hidden_size": 2 * args.hidden,
            "max_position_embeddings": args.seq_len,
        },
        "data": {
            "sources": [{"kind": "text_tree", "path": "stdlib", "max_tokens": args.seq_len}],
            "tokenizer": "byte",
            "cache": str(Path(folder) / "cache"),
        },
        "train": {
            "seq_len": args.seq_len,
            "tokens_per_step": args.rows * args.seq_len,
            "steps": args.rounds,
            "dtype": "fp32",
        },
        "optimizer": {"kind": "adamw", "lr": 1e-5, "distributed": True},
        "parallel": {
            "context": {"block": args.block},
            "assignment": {
                "kind": "planned",
                "cluster": {
                    "kind": "uniform",
                    "tokens_per_device": args.tokens_per_device or 2 * args.seq_len,
                    "intra_gb_s": 1.0,
                    "latency_s": 1e-4,
                },
                "cost": {"kind": "measured", "probe_tokens": args.probe_tokens, "repeats": 2},
                "calibrate": args.calibrate,
            },
        },
        "metrics": {"console": "quiet"},
        "eval": {"max_tokens": 0},
    }


def measure(args: argparse.Namespace) -> None:
    """One rank of the measurement."""
    import torch
    import torch.distributed as dist

    from ltrain.attention import patterns
    from ltrain.attention.layout_choice import LayoutChoice
    from ltrain.config.load import validate
    from ltrain.config.parallel import ContextSection
    from ltrain.parallel.collectives import subgroup
    from ltrain.parallel.mesh import Axis, init_process_group
    from ltrain.train.assignment import StaticAssignment
    from ltrain.train.batch import MicroBatch
    from ltrain.train.build import build_run
    from ltrain.train.main import set_seed
    from ltrain.train.optimizer import optimizer_step, set_learning_rate
    from ltrain.train.planned import Planned
    from ltrain.train.step import reduce_totals, run_model

    class Static(StaticAssignment):
        """Rows dealt over the arm's own groups, under the arm's own exchange."""

        def __init__(self, mesh: Any, node_size: int | None, layout: Any, schedule: str) -> None:
            super().__init__(mesh, node_size, layout)
            self.schedule = schedule

        def batches(self, rows: Any) -> list[MicroBatch]:
            made = super().batches(rows)
            for batch in made:
                batch.context.schedule = self.schedule
            return made

    torch.set_num_threads(1)
    if args.pin:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    config = validate(tree(args, args.folder))
    init_process_group(600)
    set_seed(config.run.seed)
    run = build_run(config)
    planned = run.assignment
    assert isinstance(planned, Planned)
    pool = run.mesh.data_context

    pattern = patterns.from_config(config.attention.pattern)

    def static(degree: int, schedule: str) -> Static:
        first = pool.rank // degree * degree
        members = tuple(range(first, first + degree))
        group = subgroup(pool.group, f"static {degree}", members)
        context = Axis("context", degree, pool.rank - first, group, members)
        data = replace(run.mesh.data, size=pool.size // degree, rank=first // degree)
        section = ContextSection(degree=degree, schedule=schedule, block=args.block)
        rule = LayoutChoice(section, pattern, run.spec.windows, num_kv_heads=run.spec.num_kv_heads)
        return Static(replace(run.mesh, context=context, data=data), None, rule, schedule)

    arms: dict[str, Any] = {"planned": planned}
    room = config.parallel.assignment.cluster.tokens_per_device
    degree = 1
    while degree <= pool.size:
        if degree * room >= args.seq_len:
            for schedule in ("ring", "ulysses") if degree > 1 else ("ring",):
                arms[f"static {degree} {schedule}" if degree > 1 else "static 1"] = static(degree, schedule)
        degree *= 2

    def step(assignment: Any, rows: list[Any]) -> tuple[float, float]:
        """Seconds of a step, and its loss."""
        dist.barrier()
        began = time.perf_counter()
        batches = assignment.batches(rows)
        run.ddp.zero_grad_buffer()
        run.optimizer.zero_grad()
        times = assignment.times
        totals = run_model(run.ddp, run.mesh, batches, train=True, times=times)
        loss = reduce_totals(totals, run.mesh).loss
        # At a learning rate of 0 all arms have the same weights, and so the same loss.
        set_learning_rate(run.optimizer, 0.0)
        optimizer_step(run.optimizer, 1.0)
        dist.barrier()
        return time.perf_counter() - began, loss

    began = time.perf_counter()
    planned.start()
    calibration_s = time.perf_counter() - began
    rounds: list[dict[str, Any]] = []
    names = list(arms)
    for number in range(args.warmup + args.rounds):
        rows = run.loader.next_step().rows
        record: dict[str, Any] = {"tokens": sum(row.num_tokens for row in rows), "s": {}, "loss": {}}
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            record["s"][name], record["loss"][name] = step(arms[name], rows)
            if name == "planned":
                metrics = planned.after_step(number + 1)
                plan = planned.last
                assert plan is not None
                record["predicted_over_measured"] = metrics["balance/lp_predicted_over_measured"]
                record["plan_wait_s"], record["plan_solve_s"] = metrics["time/plan_s"], plan.solve_s
                record["groups"] = [
                    [
                        {
                            "ranks": group.ranks,
                            "schedule": group.schedule,
                            "documents": len(group.sequences),
                            "tokens": group.num_tokens,
                            "predicted_s": group.predicted_s,
                            "measured_s": seconds,
                        }
                        for group, seconds in zip(groups, times, strict=True)
                    ]
                    for groups, times in zip(plan.micro_batches, planned.measured_s, strict=True)
                ]
        if number >= args.warmup:
            rounds.append(record)
        if dist.get_rank() == 0:
            said = ", ".join(f"{name} {seconds:.2f}" for name, seconds in record["s"].items())
            print(f"round {number - args.warmup}: {said} s", flush=True)
    planned.close()
    if dist.get_rank() == 0:
        result = {
            "arguments": {k: v for k, v in vars(args).items() if k not in ("folder", "out")},
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": _machine(),
            "calibration_s": calibration_s,
            "cost": {k: getattr(planned.cost, k) for k in ("attention_s", "linear_s", "fixed_s")},
            "rounds": rounds,
        }
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "planned_cpu.json").write_text(json.dumps(result, indent=1) + "\n")
        report(result)
    dist.destroy_process_group()


def report(result: dict[str, Any]) -> None:
    """Print the tables of a result."""
    rounds = result["rounds"]
    names = list(rounds[0]["s"])
    rate = {n: statistics.median(r["tokens"] / r["s"][n] for r in rounds) for n in names}
    best = max((n for n in names if n != "planned"), key=lambda n: rate[n])
    print(f"\n{result['machine']}; torch {result['torch']}; Python {result['python']}")
    print(f"{len(rounds)} rounds; cost model measured in {result['calibration_s']:.1f} s\n")
    print("| arm | tokens/s, median | planned over it, median of pairs | least | most |")
    print("|---|---|---|---|---|")
    for name in sorted(names, key=lambda n: -rate[n]):
        pairs = [r["s"][name] / r["s"]["planned"] for r in rounds]
        tail = f"{statistics.median(pairs):.3f} | {min(pairs):.3f} | {max(pairs):.3f}"
        print(f"| {name}{' (best static)' if name == best else ''} | {rate[name]:,.0f} | {tail} |")
    ratios = [r["predicted_over_measured"] for r in rounds]
    group_ratios = [
        group["predicted_s"] / group["measured_s"]
        for r in rounds
        for groups in r["groups"]
        for group in groups
        if group["measured_s"]
    ]
    within = sum(abs(x - 1) <= 0.2 for x in group_ratios)
    print(f"\npredicted over measured, step: median {statistics.median(ratios):.3f}, ", end="")
    print(f"from {min(ratios):.3f} to {max(ratios):.3f}")
    print(f"groups: median {statistics.median(group_ratios):.3f}, ", end="")
    print(f"{within} of {len(group_ratios)} within 20 %")
    waits = [r["plan_wait_s"] for r in rounds]
    shapes: dict[str, int] = {}
    for r in rounds:
        for groups in r["groups"]:
            shape = "+".join(str(len(group["ranks"])) for group in groups)
            shapes[shape] = shapes.get(shape, 0) + 1
    print("micro-batches by the degrees of their groups: ", end="")
    print(", ".join(f"{count} x {shape}" for shape, count in sorted(shapes.items())))
    print(f"waited for plans: median {statistics.median(waits):.4f} s, at most {max(waits):.4f} s")
    losses = [max(r["loss"].values()) / min(r["loss"].values()) - 1 for r in rounds]
    print(f"losses of a round's arms differ by at most {max(losses):.1e} (relative)")


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{len(os.sched_getaffinity(0))} cores of {name}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--ranks", type=int, default=4)
    made.add_argument("--rounds", type=int, default=8)
    made.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    made.add_argument("--seq-len", type=int, default=8192)
    made.add_argument("--rows", type=int, default=8, help="rows of a step, a multiple of the ranks")
    made.add_argument("--tokens-per-device", type=int, default=None, help="default: two rows")
    made.add_argument("--probe-tokens", type=int, default=4096)
    made.add_argument("--hidden", type=int, default=128)
    made.add_argument("--layers", type=int, default=2)
    made.add_argument("--block", type=int, default=128)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--calibrate", choices=("off", "online"), default="online")
    made.add_argument(
        "--pin",
        action="store_true",
        help="each rank on one core: equal shares where cores are fewer than ranks",
    )
    made.add_argument("--out", type=Path, default=Path("planned_cpu"))
    made.add_argument("--folder", default=None, help=argparse.SUPPRESS)
    return made


def main() -> None:
    args = parser().parse_args()
    if args.rows % args.ranks:
        raise SystemExit(f"--rows {args.rows} must be a multiple of --ranks {args.ranks}")
    if "RANK" in os.environ:
        measure(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        command = [sys.executable, "-W", "ignore", *launcher, str(Path(__file__).resolve()), *sys.argv[1:]]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        environment["PYTHONWARNINGS"] = "ignore"
        raise SystemExit(subprocess.run([*command, "--folder", folder], env=environment).returncode)


if __name__ == "__main__":
    main()
