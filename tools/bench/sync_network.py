"""Wall-clock time to a target loss over real, rate-limited links, and bytes counted on the interfaces.

    sudo python tools/bench/sync_network.py --mbit 50 [--slow-mbit 10] [--methods every_step,diloco,...]

Every replica is a process in a network namespace of its own, joined by a bridge; a token bucket filter limits
each direction of its link. Needs root and iproute2. The rendezvous service runs beside the bridge.
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

import torch

from ltrain.config.sync import DiLoCo, EveryStep, Peers, SparseLoCo
from ltrain.sync.adapt import LinkPlanner
from ltrain.sync.coordinator import WaitPolicy
from ltrain.sync.exchange import SyncError
from ltrain.sync.methods import RoundSync, build_sync
from ltrain.sync.rendezvous import Rendezvous

sys.path.insert(0, str(Path(__file__).parent))
from sync_quality import Corpus, Model, evaluate, loss_of, optimizer_of, pretrain, rate, update

BRIDGE, NET = "lsync0", "10.77.0"
SPARSE = {"aggregation": "senders", "gain": 1.0, "bits": 1}
METHODS = {
    "every_step": EveryStep(),
    "diloco": DiLoCo(steps_per_round=15, outer_momentum=0.5, gain=1.0),
    "sparse_loco": SparseLoCo(steps_per_round=15, **SPARSE),
    "adaptive": SparseLoCo(
        steps_per_round=5, adapt=True, target_round_s=1.5, max_steps_per_round=60, **SPARSE
    ),
}


def sh(command: str, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, capture_output=not check)


class Lab:
    """A star of `speeds` (Mbit/s): namespace lw<i> with e0 at 10.77.0.<10 + i>, the bridge at 10.77.0.1."""

    def __init__(self, speeds: list[float]) -> None:
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


def work(args: argparse.Namespace) -> None:
    """One replica; the first reports its loss until it reaches the target."""
    torch.set_num_threads(1)
    index = int(args.worker)
    peers = Peers(
        rendezvous=f"{NET}.1:29400",
        token_file=args.token,
        replica=f"r{index}",
        host=f"{NET}.{10 + index}",
        num_replicas=args.replicas,
        max_wait_s=120.0,
    )
    config = METHODS[args.method].model_copy(update={"peers": peers})
    model = Model()
    model.load_state_dict(torch.load(args.start, weights_only=True))
    parameters = {name: p.data for name, p in model.named_parameters()}
    sync = build_sync(config, parameters, model="bench")
    if isinstance(sync, RoundSync):
        sync.join()
    corpus, optimizer = Corpus(0), optimizer_of(model, args.lr)
    test = corpus.test()[:64]
    began, sent, reason, training = time.perf_counter(), tx_bytes(), "", 0.0
    check_at = 10
    for step in range(args.steps):
        loss_of(model, corpus.batch(step, index, 8)).backward()
        sync.reduce_gradients({n: p.grad for n, p in model.named_parameters()})
        update(model, optimizer, rate(step, args.steps, args.lr))
        report = sync.after_step(step)
        if report is not None and report.reason:
            reason = report.reason
        # Between rounds a replica's own weights say nothing about the run.
        due = report is not None if isinstance(sync, RoundSync) else step + 1 >= check_at
        if index == 0 and due:
            check_at = step + 11
            paused = time.perf_counter()
            loss = evaluate(model, test)
            training = paused - began
            row = {
                "step": step + 1,
                "loss": loss,
                "s": training,
                "wire_bytes": tx_bytes() - sent,
                "reason": reason,
            }
            print(json.dumps(row), flush=True)
            if loss <= args.target or training > args.limit_s:
                break
    sync.close()


def run(args: argparse.Namespace, method: str, lab: Lab, start: str, folder: str) -> dict:
    token = Path(folder) / "token"
    token.write_text(secrets.token_hex(16))
    token.chmod(0o600)
    config = METHODS[method]
    planner = LinkPlanner(config, every=3) if isinstance(config, SparseLoCo) and config.adapt else None
    policy = WaitPolicy(2.0, 120.0, 4.0)
    service = Rendezvous((f"{NET}.1", 29400), token.read_bytes(), len(lab.speeds), policy, planner=planner)
    options = {"method": method, "start": start, "token": token, "target": args.target, "steps": args.steps,
               "limit-s": args.limit_s, "lr": args.lr, "replicas": len(lab.speeds)}  # fmt: skip
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", f"lw{i}", *command, f"--worker={i}"],
            stdout=subprocess.PIPE if i == 0 else subprocess.DEVNULL,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for i in range(len(lab.speeds))
    ]
    try:
        out, _ = processes[0].communicate(timeout=args.limit_s + 60)
    except subprocess.TimeoutExpired:
        processes[0].kill()
        out, _ = processes[0].communicate()
    for process in processes[1:]:
        process.terminate()
        process.wait()
    service.close()
    rows = [json.loads(line) for line in out.splitlines()]
    return {"method": method, "speeds": lab.speeds, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbit", type=float, default=50)
    parser.add_argument("--slow-mbit", type=float, default=0, help="rate of the last replica")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--target", type=float, default=0.0)
    parser.add_argument("--limit-s", type=float, default=45)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--pretrain", type=int, default=300)
    parser.add_argument("--out", default="")
    parser.add_argument("--start", default="/tmp/sync_network_start.pt")
    for name in ("worker", "method", "token"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        try:
            work(args)
        except SyncError as error:
            # The first replica has left at the target.
            print(error, file=sys.stderr)
        return
    if not Path(args.start).exists():
        torch.manual_seed(0)
        model, corpus = Model(), Corpus(0)
        pretrain(model, corpus, args.pretrain, 3e-3)
        torch.save(model.state_dict(), args.start)
        print(f"start {evaluate(model, corpus.test()[:64]):.4f}", flush=True)
    speeds = [args.mbit] * args.replicas
    if args.slow_mbit:
        speeds[-1] = args.slow_mbit
    lab = Lab(speeds)
    found = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for method in args.methods.split(","):
                result = run(args, method, lab, args.start, folder)
                found.append(result)
                last = result["rows"][-1] if result["rows"] else {}
                print(f"{speeds} {method}: {json.dumps(last)}", flush=True)
                if args.out:
                    Path(args.out).write_text(json.dumps(found))
    finally:
        lab.close()


if __name__ == "__main__":
    main()
