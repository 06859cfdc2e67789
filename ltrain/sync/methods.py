"""The synchronisation of a replica as the trainer sees it: `build_sync`, `reduce_gradients`, `after_step`."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltrain.config.base import ConfigError
from ltrain.config.sync import DiLoCo, EveryStep, SparseLoCo, check_sync
from ltrain.sync.aggregate import aggregate
from ltrain.sync.compress import compress
from ltrain.sync.exchange import Commit, Exchange, Outcome
from ltrain.sync.frame import RunIdentity, write_frame
from ltrain.sync.outer import OuterState, digest_of
from ltrain.sync.payload import Payload

ShardOf = Callable[[str], str]


@dataclass(frozen=True)
class SyncReport:
    """What one round did: metrics by name (`sync/...`), and the reason of the plan that it follows."""

    round: int
    metrics: dict[str, float]
    reason: str = ""


def group_by_shard(tensors: dict[str, Tensor], shard_of: ShardOf) -> dict[str, dict[str, Tensor]]:
    """The tensors of every shard, both in order of name."""
    shards: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        shards.setdefault(shard_of(name), {})[name] = tensors[name]
    return dict(sorted(shards.items()))


def agreed_fields(config: EveryStep | DiLoCo | SparseLoCo, model: str) -> dict[str, object]:
    """The settings in which all replicas must agree, by name."""
    values = config.model_dump(exclude={"peers"})
    # Chosen by the plan, or of one replica only.
    for name in ("density", "bits") if config.kind == "sparse_loco" else ():
        if values.get("adapt"):
            values.pop(name)
    return {"model": model} | {f"sync.{name}": value for name, value in values.items()}


def run_identity(
    config: EveryStep | DiLoCo | SparseLoCo,
    tensors: dict[str, Tensor],
    *,
    model: str = "",
    shard_of: ShardOf | None = None,
) -> RunIdentity:
    """What this rank must have in common with its counterparts: settings, model, names and shapes."""
    shards = group_by_shard(tensors, shard_of or (lambda name: "all"))
    return RunIdentity.of(agreed_fields(config, model), shards)


class Replica:
    """No peers: the whole run is this job."""

    def join(self) -> bool:
        """Enter the run, before the first step and after `load_state_dict`; may be called again.

        Returns whether the parameters are now those of another replica.
        """
        return False

    def restart(self) -> None:
        """Take the parameters as they are now for the global ones; before `join`."""

    def count_from_here(self) -> None:
        """Count local progress from the parameters as they are now; needs `adapts`."""

    def reduce_gradients(self, gradients: dict[str, Tensor]) -> dict[str, float]:
        """Average gradients over replicas, in place, after backward; returns `sync/...` metrics."""
        return {}

    def after_step(self, step: int) -> SyncReport | None:
        """Call after every optimizer step; runs a round every `steps_per_round` steps, in place."""
        return None

    def finish(self) -> SyncReport | None:
        """Complete what is in flight; afterwards all replicas hold the same parameters."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """All that a bitwise resume needs beside the parameters and the inner optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back a `state_dict`, before the first step."""

    def close(self) -> None:
        """Leave the run."""


class EveryStepSync(Replica):
    """Plain data parallelism over replicas: gradients are averaged in every step, in fixed order."""

    def __init__(self, config: EveryStep, identity: RunIdentity, exchange: Exchange) -> None:
        self.config, self.identity, self.exchange = config, identity, exchange
        self.round = 0
        exchange.join(0, {})

    @torch.no_grad()
    def reduce_gradients(self, gradients: dict[str, Tensor]) -> dict[str, float]:
        began = time.perf_counter()
        payloads = {name: compress(g, density=1.0, bits=self.config.bits) for name, g in gradients.items()}
        frames = {
            shard: write_frame(self.identity, shard, self.round, payloads) for shard in self.identity.shards
        }
        self.exchange.start(self.round, frames, {})
        outcome = self.exchange.finish()
        for commit in outcome.commits:
            for name, gradient in gradients.items():
                sent = {replica: c[name] for replica, c in commit.contributions.items()}
                gradient.copy_(aggregate(sent, "mean", False, gradient.device).update)
            self.round = commit.round + 1
        self.exchange.applied(self.round, {})
        return outcome.metrics | {"sync/round_time_s": time.perf_counter() - began}

    def state_dict(self) -> dict[str, Any]:
        return {"round": self.round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.round = int(state["round"])

    def close(self) -> None:
        self.exchange.close()


class RoundSync(Replica):
    """Local steps between rounds: DiLoCo and SparseLoCo, at once or with a delayed update."""

    def __init__(
        self,
        config: DiLoCo | SparseLoCo,
        parameters: dict[str, Tensor],
        identity: RunIdentity,
        exchange: Exchange,
        adapts: bool = False,
    ) -> None:
        self.config, self.identity, self.exchange = config, identity, exchange
        self.outer = OuterState(config, parameters, adapts=adapts)
        # A joining replica may ask for the state while a round is applied.
        self._lock = threading.Lock()
        self.steps_per_round = config.steps_per_round
        self.steps_done = 0
        self._pending: dict[str, bytes] | None = None
        self._joined = False
        self._began = time.perf_counter()
        self._reason = ""
        # Seconds: of the steps since the last round, of that round, and of waiting for the others in it.
        self._step_times: list[float] = []
        self._round_s = self._wait_s = 0.0

    def join(self) -> bool:
        if self._joined:
            return False
        self._joined = True
        outcome = self.exchange.join(self.outer.round, self._digests())
        if outcome is not None:
            self._apply(outcome)
            self.outer.reset_parameters()
            self.steps_done, self._pending = 0, None
            self.exchange.applied(self.outer.round, self._digests())
        if self._pending is not None:
            self.exchange.start(self.outer.round, self._pending, {})
        self._began = time.perf_counter()
        return outcome is not None

    def restart(self) -> None:
        self.outer.take_parameters()

    def count_from_here(self) -> None:
        self.outer.restart()

    def after_step(self, step: int) -> SyncReport | None:
        self.join()
        self.steps_done += 1
        self._step_times.append(time.perf_counter() - self._began)
        report = self._exchange_round() if self.steps_done >= self.steps_per_round else None
        self._began = time.perf_counter()
        return report

    def _exchange_round(self) -> SyncReport | None:
        self.steps_done = 0
        began = time.perf_counter()
        outcome = self._complete() if self._pending is not None else None
        self._send()
        if not self.outer.delayed:
            outcome = self._complete()
            self.outer.reset_parameters()
        self._round_s = time.perf_counter() - began
        return None if outcome is None else self._report(outcome, began)

    def finish(self) -> SyncReport | None:
        began, outcome = time.perf_counter(), None
        if self._pending is not None:
            outcome = self._complete()
        if self.steps_done:
            # The last steps fill no round: they are exchanged all the same.
            self.steps_done = 0
            self._send()
            outcome = self._complete()
        # Also without a round: projected writers become whole again.
        self.outer.reset_parameters()
        return None if outcome is None else self._report(outcome, began)

    def _send(self) -> None:
        payloads = self.outer.contribute()
        frames = {s: write_frame(self.identity, s, self.outer.round, payloads) for s in self.identity.shards}
        self._pending = frames
        notes = {
            "entries": sum(theta.numel() for theta in self.outer.theta.values()),
            # A first step, a checkpoint or an evaluation among them says nothing about the next round.
            "step_s": statistics.median(self._step_times or [0.0]),
            "round_s": self._round_s,
            "wait_s": self._wait_s,
        }
        self._step_times = []
        self.exchange.start(self.outer.round, frames, notes)

    def _complete(self) -> Outcome:
        outcome = self.exchange.finish()
        sent_round = self.outer.round
        included = any(self._has_own(commit, sent_round) for commit in outcome.commits)
        if not included:
            self.outer.missed()
        self._apply(outcome)
        outcome.metrics["included"] = float(included)
        self._wait_s = outcome.metrics.get("wait_s", 0.0)
        self._pending = None
        self.exchange.applied(self.outer.round, self._digests())
        return outcome

    def _apply(self, outcome: Outcome) -> None:
        if outcome.snapshot is not None:
            with self._lock:
                self.outer.load_global_state(outcome.snapshot.tensors, outcome.snapshot.round)
        for commit in outcome.commits:
            if commit.round != self.outer.round:
                raise RuntimeError(f"commit of round {commit.round} cannot follow round {self.outer.round}")
            with self._lock:
                outcome.metrics |= self.outer.apply(commit.contributions)
            outcome.metrics["peers"] = len(commit.contributions)
            self._follow(commit)

    def _has_own(self, commit: Commit, round_: int) -> bool:
        return commit.round == round_ and self.exchange.replica in commit.contributions

    def _follow(self, commit: Commit) -> None:
        plan = commit.plan
        if plan is None:
            return
        self.steps_per_round, self._reason = plan.steps, plan.reason
        self.outer.density = plan.density.get(self.exchange.replica, self.outer.density)
        self.outer.bits = plan.bits.get(self.exchange.replica, self.outer.bits)

    def _digests(self) -> dict[str, str]:
        peers = self.config.peers
        every = peers.verify_every if peers is not None else 0
        if not every or self.outer.round % every:
            return {}
        return {
            shard: digest_of({name: self.outer.theta[name] for name in names})
            for shard, names in self.identity.shards.items()
        }

    def _report(self, outcome: Outcome, began: float) -> SyncReport:
        entries = sum(theta.numel() for theta in self.outer.theta.values())
        metrics = outcome.metrics | self.outer.norms
        metrics |= {
            "outer_steps": float(self.outer.round),
            "round_time_s": time.perf_counter() - began,
            "steps": float(self.steps_per_round),
            "density": self.outer.density,
            "bits": float(self.outer.bits),
        }
        if metrics.get("bytes_up"):
            metrics["compression"] = 4.0 * entries * max(1.0, metrics["receivers"]) / metrics["bytes_up"]
        return SyncReport(
            self.outer.round, {f"sync/{name}": value for name, value in sorted(metrics.items())}, self._reason
        )

    def snapshot(self, shard: str) -> tuple[int, dict[str, Payload]]:
        """The global state of a shard for a replica that joins: exact, every tensor with its checksum."""
        names = set(self.identity.shards[shard])
        with self._lock:
            return self.outer.round, {
                key: compress(tensor, density=1.0, bits=32)
                for key, tensor in self.outer.global_state().items()
                if key.split("/", 1)[1] in names
            }

    def state_dict(self) -> dict[str, Any]:
        state = self.outer.state_dict()
        state["steps_done"], state["steps_per_round"] = self.steps_done, self.steps_per_round
        if self._pending is not None:
            state["pending"] = {
                shard: torch.frombuffer(bytearray(frame), dtype=torch.uint8)
                for shard, frame in self._pending.items()
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.outer.load_state_dict(state)
        self.steps_done, self.steps_per_round = int(state["steps_done"]), int(state["steps_per_round"])
        pending = state.get("pending")
        self._pending = {s: t.numpy().tobytes() for s, t in pending.items()} if pending is not None else None

    def close(self) -> None:
        self.exchange.close()


def build_sync(
    config: EveryStep | DiLoCo | SparseLoCo,
    parameters: dict[str, Tensor],
    *,
    model: str = "",
    shard_of: ShardOf | None = None,
    rank: int = 0,
    num_ranks: int = 1,
    adapts: bool = False,
    exchange: Exchange | None = None,
) -> Replica:
    """The synchronisation of this rank's `parameters` with their counterparts in other replicas.

    parameters: name -> local tensor, updated in place (see `OuterState`); model: anything that identifies
    the model and its settings; shard_of: name -> shard, the unit that one rank owns in the finest-cut
    replica (default: all in one); rank, num_ranks: of this process in its replica; adapts: see `OuterState`.
    `exchange` replaces the
    transport that `config.peers` describes. Raises ConfigError on a wrong configuration, SyncError when the
    other replicas refuse this one.
    """
    if exchange is None:
        check_sync(config)
    if not parameters:
        raise ConfigError("sync.parameters", 0, "must hold at least one tensor")
    identity = run_identity(config, parameters, model=model, shard_of=shard_of)
    if exchange is None:
        if config.peers is None:
            return Replica()
        from ltrain.sync.peer import PeerExchange

        exchange = PeerExchange(config.peers, identity, rank=rank, num_ranks=num_ranks)
    if isinstance(config, EveryStep):
        return EveryStepSync(config, identity, exchange)
    sync = RoundSync(config, parameters, identity, exchange, adapts)
    serve = getattr(exchange, "serve_snapshots", None)
    if serve is not None:
        serve(sync.snapshot)
    return sync
