"""A rank's end of the transport: control messages to the rendezvous service, frames to its counterparts."""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import Any

from torch import Tensor

from ltrain.config.sync import Peers, parse_address
from ltrain.sync.compress import decompress
from ltrain.sync.dataplane import DataPlane, Remote
from ltrain.sync.exchange import Commit, Outcome, RoundPlan, Snapshot, SnapshotSource, SyncError, SyncRefused
from ltrain.sync.frame import RunIdentity
from ltrain.sync.payload import PayloadError
from ltrain.sync.wire import Channel, Message, WireError, address_towards, connect, load_token

_log = logging.getLogger(__name__)
_SNAPSHOT_TRIES = 5


class PeerExchange:
    """Implements `Exchange` over TCP for one rank of a replica (reference: `Coordinator`, `DataPlane`).

    Control runs over one connection to the rendezvous service, made again when it is lost; frames go straight
    to the ranks of other replicas that own the same shards. Raises ConfigError on an address or token that
    cannot be used, SyncError when the run refuses this replica (both sides name the differing field), cannot
    be reached for `connect_timeout_s`, or has lost its state.
    """

    def __init__(self, peers: Peers, identity: RunIdentity, *, rank: int = 0, num_ranks: int = 1) -> None:
        self.peers, self.identity, self.replica = peers, identity, peers.replica
        self.rank, self.num_ranks = rank, num_ranks
        self._token = load_token(peers.token_file)
        self._address = parse_address("sync.peers.rendezvous", peers.rendezvous)
        self._inbox: queue.Queue[Message | SyncError] = queue.Queue()
        self._remotes: list[Remote] = []
        self._control: Channel | None = None
        self._lock = threading.RLock()
        self._round = 0
        self._digests: dict[str, str] = {}
        self._arrived: dict[str, Any] | None = None
        self._closed = threading.Event()
        self._pulling = threading.Lock()
        port = peers.port + rank if peers.port else 0
        self.host = peers.host or address_towards(self._address)
        self.plane = DataPlane(
            self.replica,
            identity,
            self._token,
            (self.host, port),
            self._on_body,
            self._on_bad,
            peers.max_wait_s,
        )

    def serve_snapshots(self, source: SnapshotSource) -> None:
        """Answer replicas that join with the state that `source(shard)` gives."""
        self.plane.snapshots = source

    # Exchange.

    def join(self, round_: int, digests: dict[str, str]) -> Outcome | None:
        self._round, self._digests = round_, digests
        self._dial()
        threading.Thread(target=self._read_control, daemon=True, name="sync-control").start()
        start = self._expect("start")
        if start.fields["source"] is None and start.fields["round"] == round_:
            self._probe_links()
            return None
        outcome = self._resync(start)
        self._probe_links()
        return outcome

    def start(self, round_: int, frames: dict[str, bytes], notes: dict[str, Any]) -> None:
        self._round = round_
        self.plane.send(round_, frames, self._remotes)
        shas = {shard: sha for replica, shard, sha in self.plane.held(round_) if replica == self.replica}
        notes = notes | {"links": {k: round(v) for k, v in self.plane.traffic.links.items()}}
        notes["frame_bytes"] = sum(len(frame) for frame in frames.values())
        with self._lock:
            self._arrived = {"round": round_, "frames": shas, "digests": self._digests, "notes": notes}
            self._tell("arrived", self._arrived)

    def finish(self) -> Outcome:
        began = time.perf_counter()
        outcome = self._follow()
        with self._lock:
            self._arrived = None
        traffic = self.plane.read_traffic()
        outcome.metrics |= {
            "bytes_up": float(traffic.up),
            "bytes_down": float(traffic.down),
            "receivers": float(len(self._remotes)),
            "wait_s": time.perf_counter() - began,
        }
        for replica, speed in traffic.links.items():
            outcome.metrics[f"bandwidth/{replica}"] = speed
        return outcome

    def applied(self, round_: int, digests: dict[str, str]) -> None:
        self._round, self._digests = round_, digests
        self.plane.advance(round_)

    def close(self) -> None:
        self._closed.set()
        self.plane.close()
        with self._lock:
            if self._control is not None:
                self._control.close()

    # Rounds.

    def _follow(self) -> Outcome:
        """Follow the records from the started round on, until this replica is where the others are."""
        outcome, at = Outcome([]), self._round
        while True:
            message = self._next()
            if message.kind == "commit" and message.fields["round"] == at:
                if self.replica in message.fields["diverged"]:
                    _log.error(
                        "round %d: this replica's parameters differ from the others'; fetching theirs", at
                    )
                    return self._resync(None)
                commit = self._gather(message)
                if commit is None:
                    return self._resync(None)
                outcome.commits.append(commit)
                at += 1
                self.plane.advance(at)
                if self.replica in message.fields["on_time"]:
                    return outcome
            elif message.kind == "commit" and message.fields["round"] > at:
                return self._resync(None)
            elif message.kind == "go":
                # Sent in order behind the records: all ranks of the replica stop at the same round.
                if message.fields["round"] != at:
                    return self._resync(None)
                return outcome
            elif message.kind == "start":
                if message.fields["source"] is None and message.fields["round"] == at:
                    with self._lock:
                        if self._arrived is not None and self._arrived["round"] == at:
                            self._tell("arrived", self._arrived)
                            self._tell_held(at)
                else:
                    return self._resync(message)

    def _gather(self, message: Message) -> Commit | None:
        round_ = message.fields["round"]
        for replica, reason in message.fields["excluded"].items():
            _log.warning("round %d goes without %s: %s", round_, replica, reason)
        contributions: dict[str, dict[str, Any]] = {}
        for replica, frames in message.fields["included"].items():
            contributions[replica] = {}
            for shard in self.identity.shards:
                payloads = self.plane.get(
                    round_, replica, shard, frames[shard], self._remotes, self.peers.max_wait_s
                )
                if payloads is None:
                    return None
                contributions[replica] |= payloads
        plan = message.fields.get("plan")
        return Commit(round_, contributions, RoundPlan(**plan) if plan else None)

    def _resync(self, start: Message | None) -> Outcome:
        """Fetch the global state from the replica that the service names, then go on with the others."""
        if start is None and self.num_ranks > 1:
            raise SyncError("a rank cannot follow the run alone; restart the replica from its checkpoint")
        for attempt in range(_SNAPSHOT_TRIES):
            if start is None:
                with self._lock:
                    self._tell("resync", {})
                start = self._expect("start")
            source = start.fields["source"]
            try:
                round_, tensors = self._fetch_state(source)
            except (WireError, PayloadError, SyncError) as error:
                _log.warning("state from %s: %s", source, error)
                start = None
                time.sleep(0.2 * 2**attempt)
                continue
            self.plane.advance(round_)
            with self._lock:
                self._round = round_
                self._tell("synced", {})
            outcome = self._catch_up(Snapshot(round_, tensors))
            if outcome is not None:
                return outcome
            start = None
            time.sleep(0.2 * 2**attempt)
        raise SyncError(f"no state of the run after {_SNAPSHOT_TRIES} tries")

    def _catch_up(self, snapshot: Snapshot) -> Outcome | None:
        """Follow the records from a fetched state to the open round; None when one of them had come before
        the state was fetched from a replica that had not applied it yet."""
        outcome, at = Outcome([], snapshot), snapshot.round
        while True:
            message = self._next()
            if message.kind == "commit" and message.fields["round"] == at:
                commit = self._gather(message)
                if commit is None:
                    raise SyncError(f"round {at} cannot be followed: its frames are gone")
                outcome.commits.append(commit)
                at += 1
                self.plane.advance(at)
            elif message.kind == "go":
                if message.fields["round"] < at:
                    continue
                return None if message.fields["round"] > at else outcome

    def _fetch_state(self, source: str | None) -> tuple[int, dict[str, Tensor]]:
        rounds, tensors = set(), {}
        for shard in self.identity.shards:
            remote = next((r for r in self._remotes if r.replica == source and shard in r.shards), None)
            if remote is None:
                raise SyncError(f"{source} has no shard {shard}")
            round_, payloads = self.plane.fetch_snapshot(remote, shard, self.peers.max_wait_s)
            rounds.add(round_)
            tensors |= {name: decompress(payload) for name, payload in payloads.items()}
        if len(rounds) != 1:
            raise SyncError("a round was applied between two shards")
        return rounds.pop(), tensors

    def _probe_links(self) -> None:
        """Measure the link from one rank of every other replica, before the first round."""
        for remote in {r.replica: r for r in self._remotes}.values():
            try:
                self.plane.saw_link(remote.replica, self.plane.probe(remote))
            except WireError as error:
                _log.warning("link from %s not measured: %s", remote.replica, error)

    # Control.

    def _on_body(self, round_: int, replica: str, shard: str, sha: str) -> None:
        with self._lock:
            self._tell("have", {"round": round_, "replica": replica, "shard": shard, "sha": sha})

    def _on_bad(self, round_: int, replica: str, shard: str, reason: str) -> None:
        _log.warning("round %d: the frame of %s for shard %s is refused: %s", round_, replica, shard, reason)
        with self._lock:
            fields = {"round": round_, "replica": replica, "shard": shard, "reason": reason[:500]}
            self._tell("bad", fields)

    def _tell(self, kind: str, fields: dict[str, Any]) -> None:
        """Send to the service; what is lost with a connection is told again on the next one."""
        if self._control is None:
            return
        try:
            self._control.send(kind, fields)
        except WireError as error:
            _log.info("control: %s", error)

    def _tell_held(self, round_: int) -> None:
        for replica, shard, sha in self.plane.held(round_):
            if replica != self.replica:
                self._tell("have", {"round": round_, "replica": replica, "shard": shard, "sha": sha})

    def _dial(self) -> None:
        deadline = time.monotonic() + self.peers.connect_timeout_s
        while True:
            try:
                channel = connect(self._address, self._token)
                channel.limit_sends(30.0)
                with self._lock:
                    channel.send("hello", self._hello())
                    self._control = channel
                return
            except WireError as error:
                if time.monotonic() > deadline or self._closed.is_set():
                    raise SyncError(f"sync.peers.rendezvous={self.peers.rendezvous}: {error}") from error
                time.sleep(0.2)

    def _hello(self) -> dict[str, Any]:
        return {
            "replica": self.replica,
            "rank": self.rank,
            "num_ranks": self.num_ranks,
            "host": self.host,
            "port": self.plane.address[1],
            "shards": {shard: self.identity.shard_digest(shard) for shard in self.identity.shards},
            "fields": self.identity.fields,
            "round": self._round,
            "digests": self._digests,
        }

    def _read_control(self) -> None:
        while not self._closed.is_set():
            channel = self._control
            assert channel is not None
            try:
                self._dispatch(channel.receive())
            except SyncError as error:
                self._inbox.put(error)
                return
            except (WireError, KeyError, TypeError) as error:
                if self._closed.is_set():
                    return
                _log.warning("the rendezvous service is gone (%s); trying again", error)
                try:
                    self._dial()
                except SyncError as failure:
                    self._inbox.put(failure)
                    return

    def _dispatch(self, message: Message) -> None:
        fields = message.fields
        if message.kind == "peers":
            remotes = [
                Remote(r["replica"], int(r["rank"]), (r["host"], int(r["port"])), frozenset(r["shards"]))
                for r in fields["ranks"]
                if r["replica"] != self.replica and self.identity.shards.keys() & set(r["shards"])
            ]
            self._remotes = remotes
        elif message.kind == "refuse":
            raise SyncRefused(
                f"replica {self.replica} is refused: its {fields['field']} is {fields['yours']}, "
                f"the run has {fields['ours']}"
            )
        elif message.kind == "missing":
            threading.Thread(target=self._pull, args=(fields,), daemon=True, name="sync-pull").start()
        elif message.kind == "notice":
            _log.warning("%s", fields["text"])
        else:
            if message.kind == "error":
                raise SyncError(str(fields["reason"]))
            self._inbox.put(message)

    def _pull(self, fields: dict[str, Any]) -> None:
        """Fetch frames that did not come by themselves."""
        round_, replica = fields["round"], fields["replica"]
        for shard in sorted(self.identity.shards.keys() & fields["frames"].keys()):
            if self.plane.receiving_from(replica) or not self._pulling.acquire(blocking=False):
                return
            try:
                sha = fields["frames"][shard]
                found = self.plane.get(round_, replica, shard, sha, self._remotes, self.peers.max_wait_s)
            finally:
                self._pulling.release()
            if found is not None:
                self._on_body(round_, replica, shard, sha)

    def _next(self) -> Message:
        message = self._inbox.get()
        if isinstance(message, SyncError):
            # Every later call fails in the same way.
            self._inbox.put(message)
            raise message
        return message

    def _expect(self, kind: str) -> Message:
        while (message := self._next()).kind != kind:
            pass
        return message
