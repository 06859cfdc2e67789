"""A replica as its own process, for tests of the transport: trains a toy problem and prints what it sees."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ltrain.config.sync import DiLoCo, Peers, SparseLoCo
from ltrain.sync.exchange import SyncError
from ltrain.sync.methods import RoundSync, build_sync
from ltrain.sync.outer import digest_of
from ltrain.sync.wire import Channel


def parameters(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two layers of two stages each, equal on every replica."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"stage0.w": (128, 64), "stage0.b": (64,), "stage1.w": (64, 192), "stage1.b": (100,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shard_of(name: str) -> str:
    return name.split(".")[0]


def step(tensors: dict[str, torch.Tensor], replica: str, at: int) -> None:
    """A step of noise around a pull to zero; the noise depends on replica, step and tensor only."""
    for name, p in tensors.items():
        seed = sum(map(ord, replica + name)) * 100_003 + at
        noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        p.mul_(0.99).add_(noise, alpha=0.01)


def _last_round(options: argparse.Namespace) -> int:
    if os.path.exists(options.stop):
        return int(Path(options.stop).read_text())
    return options.rounds


def run(arguments: list[str], log: str) -> None:
    """`main` in a process that was forked with everything imported; its output goes to the file `log`."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    main(arguments)


def die_at(moment: str, round_: int, sync: RoundSync) -> None:
    """Arrange for SIGKILL at a moment of this round or a later one: no handler runs, nothing is closed."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def due() -> bool:
        return sync.outer.round >= round_

    start, apply, send = sync.exchange.start, sync.outer.apply, Channel.send

    def starting(*args: Any) -> None:
        if moment == "before-send" and due():
            kill()
        start(*args)
        if moment == "after-announce" and due():
            kill()

    def applying(*args: Any) -> dict[str, float]:
        if moment == "before-apply" and due():
            kill()
        return apply(*args)

    def sending(self: Channel, kind: str, fields: dict[str, Any] | None = None, body: bytes = b"") -> None:
        if moment == "mid-push" and kind == "body" and due():
            # The length of everything, then half of it.
            sendall = self._sock.sendall
            self._sock = SimpleNamespace(sendall=lambda data: (sendall(data[: len(data) // 2]), kill()))
        send(self, kind, fields, body)

    sync.exchange.start, sync.outer.apply, Channel.send = starting, applying, sending  # type: ignore


def save(path: str, state: dict[str, Any], *, die: bool) -> None:
    """Replace a checkpoint; `die` ends the process when half of the new one is written."""
    torch.save(state, path + ".tmp")
    if die:
        os.truncate(path + ".tmp", os.path.getsize(path + ".tmp") // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    os.replace(path + ".tmp", path)


def main(argv: list[str]) -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("config", help="JSON: kind and fields of the method")
    arguments.add_argument("--rounds", type=int, default=1_000_000)
    arguments.add_argument("--stop", default="", help="file that will hold the last round")
    arguments.add_argument("--step-s", type=float, default=0.0)
    arguments.add_argument("--stages", default="stage0,stage1", help="shards that this rank owns")
    arguments.add_argument("--rank", type=int, default=0)
    arguments.add_argument("--num-ranks", type=int, default=1)
    arguments.add_argument("--checkpoint", help="written after every round, read at the start if it is there")
    arguments.add_argument("--model", default="toy")
    arguments.add_argument("--corrupt", type=int, default=-1, help="round before which to spoil theta")
    arguments.add_argument("--die", default=":-1", help="MOMENT:ROUND of a kill -9")
    options = arguments.parse_args(argv)
    moment, die_round = options.die.split(":")
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    fields = json.loads(options.config)
    peers = Peers(**fields.pop("peers"))
    config = {"sparse_loco": SparseLoCo, "diloco": DiLoCo}[fields.pop("kind")](**fields, peers=peers)
    own = {n: p for n, p in parameters().items() if shard_of(n) in options.stages.split(",")}
    try:
        sync = build_sync(
            config,
            own,
            model=options.model,
            shard_of=shard_of,
            rank=options.rank,
            num_ranks=options.num_ranks,
        )
        assert isinstance(sync, RoundSync)
        if options.checkpoint and os.path.exists(options.checkpoint):
            state = torch.load(options.checkpoint, weights_only=True)
            sync.load_state_dict(state["sync"])
            for name, p in own.items():
                p.copy_(state["parameters"][name])
            print(json.dumps({"resumed": sync.outer.round, "error": digest_of(sync.outer.error)[:12]}))
        die_at(moment, int(die_round), sync)
        sync.join()
        at = 0
        while sync.outer.round < _last_round(options):
            step(own, peers.replica, sync.outer.round * 1000 + at)
            time.sleep(options.step_s)
            at += 1
            if sync.outer.round == options.corrupt:
                sync.outer.theta["stage0.b"][0] += 1.0
                options.corrupt = -1
            report = sync.after_step(at)
            if report is None:
                continue
            if options.checkpoint:
                state = {"sync": sync.state_dict(), "parameters": own}
                due = moment == "in-checkpoint" and sync.outer.round >= int(die_round)
                save(options.checkpoint, state, die=due)
            stages = {s: digest_of({n: t for n, t in sync.outer.theta.items() if shard_of(n) == s})[:12]
                      for s in options.stages.split(",")}  # fmt: skip
            row = {
                "round": report.round,
                "digests": stages,
                "metrics": report.metrics,
                "reason": report.reason,
            }
            print(json.dumps(row | {"error": digest_of(sync.outer.error)[:12]}), flush=True)
        sync.finish()
        # Leave time for those that are a record behind.
        time.sleep(0.3)
        sync.close()
    except SyncError as error:
        print(json.dumps({"refused": str(error)}), flush=True)
        sys.exit(3)
