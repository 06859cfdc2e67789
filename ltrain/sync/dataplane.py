"""Frames between replicas, point to point: a rank sends to the ranks that own the same shards elsewhere."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ltrain.sync.exchange import SnapshotSource
from ltrain.sync.frame import RunIdentity, read_frame, write_frame
from ltrain.sync.payload import Payload, PayloadError
from ltrain.sync.wire import Channel, Message, WireError, accept, connect, listen

_log = logging.getLogger(__name__)
_KEEP_ROUNDS = 3
_MAX_PROBE = 4 << 20
_LINK_BYTES = 1 << 16


@dataclass(frozen=True)
class Remote:
    """A rank of another replica, and the shards that it owns."""

    replica: str
    rank: int
    address: tuple[str, int]
    shards: frozenset[str]


@dataclass
class Body:
    """A frame that is here, parsed and checked."""

    sha: str
    data: bytes
    payloads: dict[str, Payload]


@dataclass
class Traffic:
    """Bytes of frames over the wire since the last reading, and goodput in bytes/s by sending replica."""

    up: int = 0
    down: int = 0
    links: dict[str, float] = field(default_factory=dict)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class DataPlane:
    """Listens for frames, sends frames, and answers requests for frames, snapshots and link probes.

    `on_body(round, replica, shard, sha)` and `on_bad(round, replica, shard, reason)` are called from reader
    threads after a frame was checked.
    """

    def __init__(
        self,
        replica: str,
        identity: RunIdentity,
        token: bytes,
        listen_at: tuple[str, int],
        on_body: Callable[[int, str, str, str], None],
        on_bad: Callable[[int, str, str, str], None],
        send_timeout_s: float,
    ) -> None:
        self.replica, self.identity, self._token = replica, identity, token
        self._on_body, self._on_bad, self._send_timeout_s = on_body, on_bad, send_timeout_s
        self.round = 0
        self.traffic = Traffic()
        self.snapshots: SnapshotSource | None = None
        self._max_body = max(4 * max(map(identity.largest_frame, identity.shards)), _MAX_PROBE)
        self._bodies: dict[tuple[int, str, str], Body] = {}
        self._lock = threading.Condition()
        self._senders: dict[tuple[str, int], _Sender] = {}
        self._closed = False
        self._open: set[Channel] = set()
        self._server = listen(*listen_at)
        self.address: tuple[str, int] = self._server.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True, name="dataplane-accept").start()

    def send(self, round_: int, frames: dict[str, bytes], remotes: list[Remote]) -> None:
        """Queue this rank's frames for every remote rank that owns their shards; returns at once."""
        with self._lock:
            self.round = round_
            for shard, data in frames.items():
                payloads = read_frame(self.identity, shard, round_, data)
                self._bodies[round_, self.replica, shard] = Body(sha256(data), data, payloads)
            self._forget()
        wanted = {(remote.replica, remote.rank): remote for remote in remotes}
        for key in list(self._senders):
            if key not in wanted or self._senders[key].remote != wanted[key]:
                self._senders.pop(key).close()
        for key, remote in wanted.items():
            if key not in self._senders:
                self._senders[key] = _Sender(self, remote)
            for shard in sorted(remote.shards & frames.keys()):
                self._senders[key].queue.put((round_, shard, frames[shard]))

    def advance(self, round_: int) -> None:
        """The next round to apply is `round_`; frames of long past rounds are dropped."""
        with self._lock:
            self.round = round_
            self._forget()

    def _forget(self) -> None:
        for key in [key for key in self._bodies if key[0] + _KEEP_ROUNDS < self.round]:
            del self._bodies[key]

    def held(self, round_: int) -> list[tuple[str, str, str]]:
        """(replica, shard, digest) of the frames of a round that are here."""
        with self._lock:
            return [(r, shard, body.sha) for (at, r, shard), body in self._bodies.items() if at == round_]

    def get(
        self, round_: int, replica: str, shard: str, sha: str, remotes: list[Remote], timeout_s: float
    ) -> dict[str, Payload] | None:
        """The frame with this digest: from here, or from any remote rank that still has it; None if no one
        has.
        """
        key = (round_, replica, shard)
        with self._lock:
            if key in self._bodies and self._bodies[key].sha == sha:
                return self._bodies[key].payloads
        # The sender first, then the others that may hold a copy.
        for remote in sorted(remotes, key=lambda r: r.replica != replica):
            if shard not in remote.shards:
                continue
            fields = {"round": round_, "replica": replica, "shard": shard}
            try:
                answer = self.request(remote, "fetch", fields, timeout_s)
            except WireError as error:
                _log.info("fetch of round %d from %s: %s", round_, remote.replica, error)
                continue
            if answer.kind == "body" and sha256(answer.body) == sha:
                try:
                    payloads = read_frame(self.identity, shard, round_, answer.body)
                except PayloadError as error:
                    _log.warning("fetch of round %d from %s: %s", round_, remote.replica, error)
                    continue
                with self._lock:
                    self._bodies[key] = Body(sha, answer.body, payloads)
                return payloads
        return None

    def receiving_from(self, replica: str) -> bool:
        """A frame of the replica is on its way in."""
        with self._lock:
            return any(channel.busy and channel.label == replica for channel in self._open)

    def request(self, remote: Remote, kind: str, fields: dict[str, object], timeout_s: float) -> Message:
        """Ask a remote rank on a connection of its own. Raises WireError."""
        channel = connect(remote.address, self._token, max_body=self._max_body)
        try:
            channel.settimeout(timeout_s)
            channel.send(kind, fields)
            answer = channel.receive()
            self._count(up=channel.bytes_sent, down=channel.bytes_received)
            return answer
        finally:
            channel.close()

    def fetch_snapshot(self, remote: Remote, shard: str, timeout_s: float) -> tuple[int, dict[str, Payload]]:
        """Global state of a shard from a remote rank: (round, payloads by name), each with its checksum.

        Raises WireError or PayloadError.
        """
        answer = self.request(remote, "snapshot", {"shard": shard}, timeout_s)
        if answer.kind != "body":
            raise WireError(f"{remote.replica} gives no snapshot: {answer.fields.get('reason', answer.kind)}")
        round_, names = int(answer.fields["round"]), answer.fields["names"]
        if sha256(answer.body) != answer.fields["sha"]:
            raise PayloadError("the snapshot does not match its digest")
        if not isinstance(names, list) or len(names) > 4 * len(self.identity.shards[shard]):
            raise PayloadError("the snapshot names no tensors of this run")
        return round_, read_frame(self._snapshot_identity(shard, names), shard, round_, answer.body)

    def _snapshot_identity(self, shard: str, names: list[str]) -> RunIdentity:
        shapes = self.identity.shards[shard]
        try:
            found = {str(name): shapes[str(name).split("/", 1)[1]] for name in names}
        except (KeyError, IndexError) as error:
            raise PayloadError(f"the snapshot holds an unknown tensor: {error}") from error
        return RunIdentity(self.identity.fields, {shard: found})

    def probe(self, remote: Remote) -> float:
        """Goodput from a remote rank in bytes/s, from transfers of up to 4 MiB and about 0.2 s."""
        size, speed = 1 << 16, 0.0
        while True:
            channel = connect(remote.address, self._token, max_body=self._max_body)
            try:
                channel.settimeout(10.0)
                channel.send("probe", {"bytes": size})
                channel.receive()
                self._count(up=channel.bytes_sent, down=channel.bytes_received)
                speed = size / max(channel.last_body_s, 1e-6)
                if channel.last_body_s > 0.2 or size >= _MAX_PROBE:
                    return speed
            finally:
                channel.close()
            size = min(_MAX_PROBE, size * 8)

    def read_traffic(self) -> Traffic:
        """Traffic since the last reading; link speeds are kept."""
        with self._lock:
            seen, self.traffic = self.traffic, Traffic(links=dict(self.traffic.links))
            return seen

    def _count(self, up: int = 0, down: int = 0) -> None:
        with self._lock:
            self.traffic.up += up
            self.traffic.down += down

    def saw_link(self, replica: str, speed: float) -> None:
        """Track a link: an exponential mean of its goodput."""
        with self._lock:
            old = self.traffic.links.get(replica)
            self.traffic.links[replica] = speed if old is None else 0.7 * old + 0.3 * speed

    def close(self) -> None:
        """Stop listening and sending; frames queued for healthy peers are given a moment to leave."""
        for sender in self._senders.values():
            sender.close()
        for sender in self._senders.values():
            sender.thread.join(timeout=2.0)
        self._closed = True
        # Closing alone leaves accept() waiting, and accepting, in its thread.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._lock:
            channels = list(self._open)
        for channel in channels:
            channel.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True, name="dataplane-read").start()

    def _serve(self, sock: socket.socket) -> None:
        channel: Channel | None = None
        try:
            channel = accept(sock, self._token, max_body=self._max_body)
            channel.limit_sends(self._send_timeout_s)
            with self._lock:
                self._open.add(channel)
            received = 0
            while True:
                message = channel.receive()
                self._count(down=channel.bytes_received - received)
                received = channel.bytes_received
                if message.kind == "push":
                    channel.label = str(message.fields["replica"])
                elif message.kind == "body":
                    self._take(message, channel.last_body_s)
                else:
                    self._answer(channel, message)
        except (WireError, KeyError, TypeError, ValueError) as error:
            _log.debug("dataplane: %s", error)
        finally:
            if channel is not None:
                channel.close()
                with self._lock:
                    self._open.discard(channel)

    def _take(self, message: Message, seconds: float) -> None:
        round_, replica, shard = (message.fields[name] for name in ("round", "replica", "shard"))
        if replica == self.replica or shard not in self.identity.shards or not isinstance(round_, int):
            raise WireError(f"a frame of {replica} for shard {shard} does not belong here")
        if len(message.body) >= _LINK_BYTES:
            self.saw_link(replica, len(message.body) / max(seconds, 1e-6))
        with self._lock:
            # The sender may have applied the last record a moment before this rank did.
            if not self.round <= round_ <= self.round + 1:
                _log.info("a frame of %s for round %d came in round %d", replica, round_, self.round)
                return
            if (round_, replica, shard) in self._bodies:
                return
        try:
            payloads = read_frame(self.identity, shard, round_, message.body)
        except PayloadError as error:
            self._on_bad(round_, replica, shard, str(error))
            return
        body = Body(sha256(message.body), message.body, payloads)
        with self._lock:
            self._bodies.setdefault((round_, replica, shard), body)
        self._on_body(round_, replica, shard, body.sha)

    def _answer(self, channel: Channel, message: Message) -> None:
        fields = message.fields
        if message.kind == "fetch":
            with self._lock:
                body = self._bodies.get((fields["round"], fields["replica"], fields["shard"]))
            channel.send("body", {}, body.data) if body is not None else channel.send("gone")
        elif message.kind == "probe":
            channel.send("body", {}, os.urandom(max(0, min(int(fields["bytes"]), _MAX_PROBE))))
        elif message.kind == "snapshot" and self.snapshots is not None:
            shard = fields["shard"]
            if shard not in self.identity.shards:
                channel.send("gone", {"reason": f"no shard {shard}"})
                return
            round_, payloads = self.snapshots(shard)
            identity = self._snapshot_identity(shard, list(payloads))
            data = write_frame(identity, shard, round_, payloads)
            names = list(identity.shards[shard])
            channel.send("body", {"round": round_, "sha": sha256(data), "names": names}, data)
        else:
            channel.send("gone", {"reason": f"cannot answer {message.kind}"})
        self._count(up=channel.bytes_sent)


class _Sender:
    """Sends queued frames to one remote rank, so that a slow or dead one delays nobody else."""

    def __init__(self, plane: DataPlane, remote: Remote) -> None:
        self.plane, self.remote = plane, remote
        self.queue: queue.Queue[tuple[int, str, bytes] | None] = queue.Queue()
        self.thread = threading.Thread(target=self._run, daemon=True, name=f"to-{remote.replica}")
        self.thread.start()

    def close(self) -> None:
        self.queue.put(None)

    def _run(self) -> None:
        channel: Channel | None = None
        while (item := self.queue.get()) is not None:
            round_, shard, data = item
            fields = {"round": round_, "replica": self.plane.replica, "shard": shard}
            for attempt in range(8):
                # What the others no longer wait for is not worth the link.
                if round_ < self.plane.round:
                    break
                try:
                    if channel is None:
                        channel = connect(self.remote.address, self.plane._token)
                        channel.limit_sends(self.plane._send_timeout_s)
                        channel.send("push", {"replica": self.plane.replica})
                    channel.check_open()
                    before = channel.bytes_sent
                    channel.send("body", fields, data)
                    self.plane._count(up=channel.bytes_sent - before)
                    break
                except WireError as error:
                    _log.info("sending to %s: %s", self.remote.replica, error)
                    channel = None
                    time.sleep(min(2.0, 0.05 * 2**attempt))
        if channel is not None:
            channel.close()
