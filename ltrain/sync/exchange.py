"""The seam between a synchronisation method and whatever carries its frames to the other replicas."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ltrain.sync.frame import RunIdentity, read_frame
from ltrain.sync.payload import Payload


class SyncError(RuntimeError):
    """The other replicas cannot be reached, or refuse this one; the job stops and can be resumed."""


class SyncRefused(SyncError):
    """The run has another model, setting or layout than this replica; its text names the field and both
    values.
    """


@dataclass(frozen=True)
class RoundPlan:
    """What the next round does, decided for all replicas at once: local steps, and per replica its codec."""

    steps: int
    density: dict[str, float]
    bits: dict[str, int]
    reason: str


@dataclass(frozen=True)
class Commit:
    """A finished round: these contributions, {replica: {tensor name: payload}}, are applied by all."""

    round: int
    contributions: dict[str, dict[str, Payload]]
    plan: RoundPlan | None = None


@dataclass(frozen=True)
class Snapshot:
    """The global state of another replica at the start of `round`: theta and momentum by prefixed name."""

    round: int
    tensors: dict[str, Tensor]


@dataclass
class Outcome:
    """What a replica has to apply after a round: a snapshot if it fell behind, then commits in order."""

    commits: list[Commit]
    snapshot: Snapshot | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Exchange(Protocol):
    """Carries frames between the ranks that own the same shards in different replicas."""

    replica: str

    def join(self, round_: int, digests: dict[str, str]) -> Outcome | None:
        """Enter the run with a state of `round_`; what to apply first if the run is elsewhere."""

    def start(self, round_: int, frames: dict[str, bytes], notes: dict[str, Any]) -> None:
        """Send the frames of a round by shard; returns at once."""

    def finish(self) -> Outcome:
        """Wait for the round that was started, to its commit. Raises SyncError."""

    def applied(self, round_: int, digests: dict[str, str]) -> None:
        """Tell that this rank is now at the start of `round_`, with these digests by shard."""

    def close(self) -> None: ...


SnapshotSource = Callable[[str], tuple[int, dict[str, Payload]]]


class LocalHub:
    """Connects replicas that are threads of one process: for tests and simulations."""

    def __init__(self, replicas: list[str], identity: RunIdentity) -> None:
        self.replicas, self.identity = replicas, identity
        self._frames: dict[tuple[int, str], dict[str, bytes]] = {}
        self._changed = threading.Condition()

    def exchange(self, replica: str) -> LocalExchange:
        """The end of one replica."""
        return LocalExchange(self, replica)

    def put(self, round_: int, replica: str, frames: dict[str, bytes]) -> None:
        with self._changed:
            self._frames[round_, replica] = frames
            self._changed.notify_all()

    def wait(self, round_: int) -> dict[str, dict[str, bytes]]:
        with self._changed:
            complete = self._changed.wait_for(
                lambda: all((round_, replica) in self._frames for replica in self.replicas), timeout=60.0
            )
            if not complete:
                raise SyncError(f"round {round_}: a replica sent nothing for 60 s")
            return {replica: self._frames[round_, replica] for replica in self.replicas}


class LocalExchange:
    """One replica's end of a `LocalHub`."""

    def __init__(self, hub: LocalHub, replica: str) -> None:
        self.hub, self.replica = hub, replica
        self._round = 0

    def join(self, round_: int, digests: dict[str, str]) -> Outcome | None:
        return None

    def start(self, round_: int, frames: dict[str, bytes], notes: dict[str, Any]) -> None:
        self._round = round_
        self.hub.put(round_, self.replica, frames)

    def finish(self) -> Outcome:
        contributions: dict[str, dict[str, Payload]] = {}
        for replica, frames in self.hub.wait(self._round).items():
            contributions[replica] = {}
            for shard in self.hub.identity.shards:
                contributions[replica] |= read_frame(self.hub.identity, shard, self._round, frames[shard])
        return Outcome([Commit(self._round, contributions)])

    def applied(self, round_: int, digests: dict[str, str]) -> None:
        pass

    def close(self) -> None:
        pass
