"""Wall-clock time to a target loss over real, rate-limited links, and bytes counted on the interfaces.

    sudo python tools/bench/sync_network.py --out DIR [--scenarios 10,50,500,slow-peer] [--methods ...]
    python tools/bench/sync_network.py --report DIR

Every replica is a process in a network namespace of its own, joined by a bridge; a token bucket filter limits
each direction of its link. The model, its start and its data are those of sync_quality.py. Needs root and
iproute2. The rendezvous service runs beside the bridge. What is in DIR is not measured again.
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

from ltrain.config.sync import DiLoCo, EveryStep, Peers, SparseLoCo
from ltrain.sync.adapt import LinkPlanner
from ltrain.sync.coordinator import WaitPolicy
from ltrain.sync.exchange import SyncError
from ltrain.sync.methods import RoundSync, build_sync
from ltrain.sync.rendezvous import Rendezvous

sys.path.insert(0, str(Path(__file__).parent))
import sync_quality as quality

BRIDGE, NET, PORT = "lsync0", "10.77.0", 29400
# Mbit/s of each replica's link, both ways.
SCENARIOS = {"10": [10] * 3, "50": [50] * 3, "500": [500] * 3, "slow-peer": [500, 500, 10]}
SPARSE: dict[str, Any] = {"aggregation": "senders", "gain": 1.0, "bits": 1}
METHODS: dict[str, EveryStep | DiLoCo | SparseLoCo] = {
    "every_step": EveryStep(bits=16),
    "diloco": DiLoCo(steps_per_round=15, outer_momentum=0.5, gain=1.0, bits=16),
    "sparse_loco": SparseLoCo(steps_per_round=15, **SPARSE),
    "adaptive": SparseLoCo(
        steps_per_round=5, adapt=True, target_round_s=1.5, max_steps_per_round=60, **SPARSE
    ),
}
TITLES = {
    "every_step": "every step, bfloat16",
    "diloco": "DiLoCo, H=15, bfloat16",
    "sparse_loco": "SparseLoCo, H=15, k=64, sign",
    "adaptive": "SparseLoCo, adaptive from H=5",
}


def sh(command: str, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, capture_output=not check)


class Lab:
    """A star of `speeds` (Mbit/s): namespace lw<i> with e0 at 10.77.0.<10 + i>, the bridge at 10.77.0.1."""

    def __init__(self, speeds: list[int]) -> None:
        self.speeds = speeds
        self.close()
        sh(f"ip link add {BRIDGE} type bridge")
        sh(f"ip addr add {NET}.1/24 dev {BRIDGE}")
        sh(f"ip link set {BRIDGE} up")
        for i, speed in enumerate(speeds):
            sh(f"ip netns add lw{i}")
            sh(f"ip link add lv{i} type veth peer name e0 netns lw{i}")
            sh(f"ip link set lv{i} master {BRIDGE} up")
            inside = f"ip netns exec lw{i} "
            sh(inside + f"ip addr add {NET}.{10 + i}/24 dev e0")
            sh(inside + "ip link set e0 up")
            sh(inside + "ip link set lo up")
            for prefix, device in ((inside, "e0"), ("", f"lv{i}")):
                sh(prefix + f"tc qdisc add dev {device} root tbf rate {speed}mbit burst 256kb latency 400ms")

    def close(self) -> None:
        for i in range(8):
            sh(f"ip netns del lw{i}", check=False)
        sh(f"ip link del {BRIDGE}", check=False)


def tx_bytes() -> int:
    return int(Path("/sys/class/net/e0/statistics/tx_bytes").read_text())


def rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up over 10 steps, then constant: a time to a target must not depend on a planned end."""
    return args.lr * min(1.0, (step + 1) / 10)


def work(args: argparse.Namespace) -> None:
    """One replica; the first reports its loss until it reaches the target."""
    torch.set_num_threads(1)
    index = int(args.worker)
    peers = Peers(
        rendezvous=f"{NET}.1:{PORT}",
        token_file=args.token,
        replica=f"r{index}",
        host=f"{NET}.{10 + index}",
        num_replicas=len(SCENARIOS[args.scenario]),
        max_wait_s=120.0,
    )
    config = METHODS[args.method].model_copy(update={"peers": peers})
    model = quality.Model()
    model.load_state_dict(torch.load(args.start, weights_only=True))
    sync = build_sync(config, {name: p.data for name, p in model.named_parameters()}, model="bench")
    sync.join()
    corpus, optimizer = quality.Corpus(0), quality.optimizer_of(model, args.lr)
    test = corpus.test(128)
    began, sent, reason, check_at = time.perf_counter(), tx_bytes(), "", 10
    for step in range(args.steps):
        quality.loss_of(model, corpus.batch(step, index, 8)).backward()
        sync.reduce_gradients({name: p.grad for name, p in model.named_parameters()})
        quality.update(model, optimizer, rate(step, args))
        report = sync.after_step(step)
        if report is not None and report.reason:
            reason = report.reason
        elapsed = time.perf_counter() - began
        # Between rounds a replica's own weights say nothing about the run.
        rounds = isinstance(sync, RoundSync)
        due = report is not None if rounds else step + 1 >= check_at or elapsed > args.limit_s
        if index == 0 and due:
            check_at = step + 11
            loss = quality.evaluate(model, test)
            row = {"step": step + 1, "loss": loss, "s": elapsed, "bytes": tx_bytes() - sent, "reason": reason}
            print(json.dumps(row), flush=True)
            if loss <= args.target or elapsed > args.limit_s:
                break
    sync.close()


def measure(args: argparse.Namespace, scenario: str, method: str, start: Path, folder: str) -> dict[str, Any]:
    """Run a method until the first replica reaches the target loss or the limit."""
    token = Path(folder) / "token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    config, speeds = METHODS[method], SCENARIOS[scenario]
    adapts = isinstance(config, SparseLoCo) and config.adapt
    service = Rendezvous(
        (f"{NET}.1", PORT),
        token.read_bytes(),
        len(speeds),
        WaitPolicy(2.0, 120.0, 4.0),
        planner=LinkPlanner(config, every=3) if adapts else None,  # type: ignore[arg-type]
    )
    options = {"method": method, "scenario": scenario, "start": start, "token": token, "target": args.target,
               "steps": args.steps, "limit-s": args.limit_s, "lr": args.lr}  # fmt: skip
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", f"lw{i}", *command, f"--worker={i}"],
            stdout=subprocess.PIPE if i == 0 else subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for i in range(len(speeds))
    ]
    try:
        out, _ = processes[0].communicate(timeout=args.limit_s + 60)
    except subprocess.TimeoutExpired:
        processes[0].kill()
        out, _ = processes[0].communicate()
    finally:
        for process in processes:
            process.kill()
            process.wait()
        service.close()
    return {"scenario": scenario, "method": method, "target": args.target, "limit_s": args.limit_s,
            "rows": [json.loads(line) for line in out.splitlines()]}  # fmt: skip


def cell(found: dict[tuple[str, str], dict[str, Any]], scenario: str, method: str) -> str:
    """Time to the target; in italics what is computed where it was not reached within the limit."""
    result = found.get((scenario, method))
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


def report(folder: Path) -> None:
    found = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        found[result["scenario"], result["method"]] = result
    names = [scenario for scenario in SCENARIOS if any(key[0] == scenario for key in found)]
    print("| method | " + " | ".join(f"{'-'.join(map(str, SCENARIOS[n]))} Mbit/s" for n in names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for method, title in TITLES.items():
        print(f"| {title} | " + " | ".join(cell(found, name, method) for name in names) + " |")
    for (scenario, method), result in sorted(found.items()):
        if method == "adaptive" and result["rows"]:
            print(f"\n{scenario}: {result['rows'][-1]['reason']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--target", type=float, default=1.50, help="held-out loss, nats a byte")
    parser.add_argument("--limit-s", type=float, default=30.0, help="of one method over one kind of link")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    parser.add_argument("--pretrain-lr", type=float, default=4e-3)
    for name in ("worker", "method", "scenario", "token", "start"):
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
    start = quality.start_path(0, args)
    if not start.exists():
        print(quality.pretrain(0, args), flush=True)
    for scenario in args.scenarios.split(","):
        lab = Lab(SCENARIOS[scenario])
        try:
            for method in args.methods.split(","):
                path = args.out / f"{scenario}-{method}.json"
                if path.exists():
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    result = measure(args, scenario, method, start, folder)
                path.write_text(json.dumps(result))
                print(
                    f"{scenario} {method}: {result['rows'][-1] if result['rows'] else 'nothing'}", flush=True
                )
        finally:
            lab.close()


if __name__ == "__main__":
    main()
