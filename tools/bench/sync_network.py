"""Wall-clock time to a target loss over real, rate-limited links, and bytes counted on the interfaces.

    sudo python tools/bench/sync_network.py --out DIR [--scenarios 10,50,500,slow-peer] [--delay-ms 25]
    python tools/bench/sync_network.py --report DIR

Every replica is a process in a network namespace of its own; a token bucket filter limits each direction of
its link, and with `--delay-ms` every packet is held for so long (slow_links.py). The model, its start and its
data are those of sync_quality.py. Needs root and iproute2. The rendezvous service runs outside of the
namespaces, behind the same delay. What is in DIR is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from byte_gpt import Corpus, Pretraining, constant_rate, evaluate, loss_of, optimizer_of, update
from slow_links import OUTSIDE, Lab, inside, round_trip_ms, tx_bytes, worker_address

from ltrain.config.sync import DiLoCo, EveryStep, Peers, SparseLoCo
from ltrain.sync.coordinator import WaitPolicy
from ltrain.sync.exchange import SyncError
from ltrain.sync.link_planner import LinkPlanner
from ltrain.sync.methods import RoundSync, build_sync
from ltrain.sync.rendezvous import Rendezvous

PORT = 29400
# On a busy machine the replicas take long to import; their own clock starts afterwards.
START_S = 180.0
# Mbit/s of each replica's link, both ways.
SCENARIOS = {"10": [10] * 3, "50": [50] * 3, "500": [500] * 3, "slow-peer": [500, 500, 10]}
SPARSE: dict[str, Any] = {"aggregation": "senders", "gain": 1.0, "bits": 1}
METHODS: dict[str, EveryStep | DiLoCo | SparseLoCo] = {
    "every_step": EveryStep(bits=16),
    "diloco": DiLoCo(steps_per_round=15, outer_momentum=0.5, gain=1.0, bits=16),
    "sparse_loco": SparseLoCo(steps_per_round=15, **SPARSE),
    "adaptive": SparseLoCo(
        steps_per_round=5, adapt=True, target_round_s=10.0, max_steps_per_round=60, **SPARSE
    ),
}
TITLES = {
    "every_step": "every step, bfloat16",
    "diloco": "DiLoCo, H=15, bfloat16",
    "sparse_loco": "SparseLoCo, H=15, k=64, sign",
    "adaptive": "SparseLoCo, adaptive from H=5",
}


def work(args: argparse.Namespace) -> None:
    """One replica; the first reports its loss until it reaches the target."""
    torch.set_num_threads(1)
    index = int(args.worker)
    peers = Peers(
        rendezvous=f"{OUTSIDE}:{PORT}",
        token_file=args.token,
        replica=f"r{index}",
        host=worker_address(index),
        num_replicas=len(SCENARIOS[args.scenario]),
        max_wait_s=120.0,
    )
    config = METHODS[args.method].model_copy(update={"peers": peers})
    model = Pretraining(args.out).load(0)
    sync = build_sync(config, {name: p.data for name, p in model.named_parameters()}, model="bench")
    sync.join()
    corpus, optimizer = Corpus(0), optimizer_of(model, args.lr)
    test = corpus.test(128)
    if index == 0:
        print(json.dumps({"round_trip_ms": round_trip_ms(worker_address(1))}), flush=True)
    began, sent, reason, check_at = time.perf_counter(), tx_bytes(), "", 10
    for step in range(args.steps):
        loss_of(model, corpus.batch(step, index, 8)).backward()
        sync.reduce_gradients({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        update(model, optimizer, constant_rate(step, args.lr))
        report = sync.after_step(step)
        if report is not None and report.reason:
            reason = report.reason
        elapsed = time.perf_counter() - began
        # Between rounds a replica's own weights say nothing about the run.
        rounds = isinstance(sync, RoundSync)
        due = report is not None if rounds else step + 1 >= check_at or elapsed > args.limit_s
        if index == 0 and due:
            check_at = step + 11
            loss = evaluate(model, test)
            row = {"step": step + 1, "loss": loss, "s": elapsed, "bytes": tx_bytes() - sent, "reason": reason}
            print(json.dumps(row), flush=True)
            if loss <= args.target or elapsed > args.limit_s:
                break
    sync.close()


def measure(args: argparse.Namespace, scenario: str, method: str, folder: str) -> dict[str, Any]:
    """Run a method until the first replica reaches the target loss or the limit."""
    token = Path(folder) / "token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    config, speeds = METHODS[method], SCENARIOS[scenario]
    adapts = isinstance(config, SparseLoCo) and config.adapt
    service = Rendezvous(
        (OUTSIDE, PORT),
        token.read_bytes(),
        len(speeds),
        WaitPolicy(2.0, 120.0, 4.0),
        planner=LinkPlanner(config, every=3) if adapts else None,  # type: ignore[arg-type]
    )
    options = {"method": method, "scenario": scenario, "out": args.out, "token": token, "target": args.target,
               "steps": args.steps, "limit-s": args.limit_s, "lr": args.lr}  # fmt: skip
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    processes = [
        subprocess.Popen(
            [*inside(i), *command, f"--worker={i}"],
            stdout=subprocess.PIPE if i == 0 else subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for i in range(len(speeds))
    ]
    try:
        out, _ = processes[0].communicate(timeout=START_S + args.limit_s + 60)
    except subprocess.TimeoutExpired:
        processes[0].kill()
        out, _ = processes[0].communicate()
    finally:
        for process in processes:
            process.kill()
            process.wait()
        service.close()
    first, *rows = [json.loads(line) for line in out.splitlines()] or [{}]
    settings = {"scenario": scenario, "delay_ms": args.delay_ms, "method": method, "target": args.target}
    return settings | {"limit_s": args.limit_s, "rows": rows} | first


Links = tuple[str, float]


def cell(found: dict[tuple[Links, str], dict[str, Any]], links: Links, method: str) -> str:
    """Time to the target; in italics what is computed where it was not reached within the limit."""
    result = found.get((links, method))
    if result is None or not result["rows"]:
        return "not measured"
    last = result["rows"][-1]
    if last["loss"] <= result["target"]:
        return f"{last['s']:.1f} s ({last['step']} steps, {last['bytes'] / 1e6:.1f} MB)"
    # With a fixed H the steps to the target do not depend on the links.
    reached = [r["rows"][-1] for (_, m), r in found.items() if m == method and r["rows"]]
    steps = [row["step"] for row in reached if row["loss"] <= result["target"]]
    if method == "adaptive" or not steps:
        return f"not within {result['limit_s']:.0f} s"
    seconds = last["s"] / last["step"] * steps[0]
    nbytes = last["bytes"] / last["step"] * steps[0] / 1e6
    return f"*{seconds:.0f} s* ({steps[0]} steps, {nbytes:.1f} MB; computed from {last['step']} steps)"


def heading(links: Links, results: list[dict[str, Any]]) -> str:
    scenario, delay_ms = links
    rates = f"{'-'.join(map(str, SCENARIOS[scenario]))} Mbit/s"
    trips = [result["round_trip_ms"] for result in results if "round_trip_ms" in result]
    return f"{rates}, {min(trips):.0f} ms round trip" if delay_ms and trips else rates


def report(folder: Path) -> None:
    found: dict[tuple[Links, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        found[(result["scenario"], result.get("delay_ms", 0.0)), result["method"]] = result
    order = list(SCENARIOS)
    columns = sorted({links for links, _ in found}, key=lambda links: (order.index(links[0]), links[1]))
    heads = [heading(links, [r for (at, _), r in found.items() if at == links]) for links in columns]
    print(f"| method | {' | '.join(heads)} |")
    print("|---" * (len(columns) + 1) + "|")
    for method, title in TITLES.items():
        print(f"| {title} | " + " | ".join(cell(found, links, method) for links in columns) + " |")
    for (links, method), result in sorted(found.items()):
        if method == "adaptive" and result["rows"]:
            plans = list(dict.fromkeys(row["reason"] for row in result["rows"] if row["reason"]))
            print("\n" + "\n".join(f"{heading(links, [result])}: {plan}" for plan in plans))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--delay-ms", type=float, default=0.0, help="of every packet, one way")
    parser.add_argument("--target", type=float, default=1.50, help="held-out loss, nats a byte")
    parser.add_argument("--limit-s", type=float, default=30.0, help="of one method over one kind of link")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=5e-4)
    for name in ("worker", "method", "scenario", "token"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        try:
            work(args)
        except SyncError as error:
            # The first replica has left at the target.
            print(error, file=sys.stderr)
        return
    if args.report:
        report(args.report)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if not Pretraining(args.out).path(0).exists():
        print(Pretraining(args.out).run(0), flush=True)
    for scenario in args.scenarios.split(","):
        lab = Lab(SCENARIOS[scenario], args.delay_ms)
        try:
            for method in args.methods.split(","):
                delay = f"-{args.delay_ms:g}ms" if args.delay_ms else ""
                path = args.out / f"{scenario}{delay}-{method}.json"
                if path.exists():
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    result = measure(args, scenario, method, folder)
                path.write_text(json.dumps(result))
                end = result["rows"][-1] if result["rows"] else "nothing"
                print(f"{scenario}{delay} {method}: {end}", flush=True)
        finally:
            lab.close()


if __name__ == "__main__":
    main()
