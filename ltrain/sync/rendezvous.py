"""The rendezvous service: a small TCP server in front of the `Coordinator`, with a durable log of records."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from ltrain.config.base import ConfigError
from ltrain.config.sync import DiLoCo, EveryStep, SparseLoCo, check_sync, parse_address
from ltrain.sync.coordinator import Coordinator, Planner, RankId, Send, WaitPolicy
from ltrain.sync.link_planner import LinkPlanner
from ltrain.sync.wire import Channel, Message, WireError, accept, listen, load_token

_log = logging.getLogger(__name__)
_MAX_CONNECTIONS = 1024
_HELLO = {"replica": str, "rank": int, "num_ranks": int, "host": str, "port": int, "shards": dict,
          "fields": dict, "round": int, "digests": dict}  # fmt: skip
_KINDS: dict[str, dict[str, type]] = {
    "arrived": {"round": int, "frames": dict, "digests": dict, "notes": dict},
    "have": {"round": int, "replica": str, "shard": str, "sha": str},
    "bad": {"round": int, "replica": str, "shard": str, "reason": str},
    "synced": {},
    "resync": {},
}


class Rendezvous:
    """Serves one run at `address` until `close`. Records go to `log_path`, fsynced, before they are sent.

    The service holds no parameters: after it restarts the replicas come back with the round that they are in,
    and the open round is repeated. After a restart it waits for as many replicas as the last record had.
    """

    def __init__(
        self,
        address: tuple[str, int],
        token: bytes,
        num_replicas: int,
        policy: WaitPolicy,
        *,
        log_path: str | os.PathLike[str] | None = None,
        planner: Planner | None = None,
    ) -> None:
        self._token = token
        self._log_path = Path(log_path) if log_path is not None else None
        self.coordinator = Coordinator(self._needed(num_replicas), policy, planner)
        self._lock = threading.RLock()
        self._channels: dict[RankId, Channel] = {}
        self._closed = threading.Event()
        self._slots = threading.Semaphore(_MAX_CONNECTIONS)
        self._server = listen(*address)
        self.address: tuple[str, int] = self._server.getsockname()[:2]
        for target in (self._accept, self._tick):
            threading.Thread(target=target, daemon=True, name=f"rendezvous-{target.__name__}").start()

    def _needed(self, num_replicas: int) -> int:
        if self._log_path is None or not self._log_path.exists():
            return num_replicas
        lines = [line for line in self._log_path.read_text().splitlines() if line.endswith("}")]
        return max(1, min(num_replicas, len(json.loads(lines[-1])["on_time"]))) if lines else num_replicas

    def close(self) -> None:
        """Stop serving; open connections are closed."""
        self._closed.set()
        # Closing alone leaves accept() waiting, and accepting, in its thread.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._lock:
            for channel in self._channels.values():
                channel.close()

    def wait(self) -> None:
        """Block until `close`."""
        self._closed.wait()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            if not self._slots.acquire(blocking=False):
                sock.close()
                continue
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _tick(self) -> None:
        while not self._closed.wait(0.05):
            with self._lock:
                self._deliver(self.coordinator.check(time.monotonic()))

    def _serve(self, sock: socket.socket) -> None:
        who: RankId | None = None
        channel: Channel | None = None
        try:
            channel = accept(sock, self._token)
            channel.settimeout(30.0)
            hello = channel.receive()
            if hello.kind != "hello" or not _valid(hello.fields, _HELLO):
                raise WireError("the first message is no valid hello")
            who = RankId(hello.fields["replica"], hello.fields["rank"])
            channel.settimeout(None)
            channel.limit_sends(5.0)
            with self._lock:
                refusal = self.coordinator.refusal(who, hello.fields)
                if refusal is not None:
                    self._refuse(channel, who, *refusal)
                    who = None
                    return
                old = self._channels.pop(who, None)
                if old is not None:
                    # A restarted process takes the place of its predecessor.
                    old.close()
                    self._deliver(self.coordinator.lost(who))
                self._channels[who] = channel
                self._deliver(self.coordinator.hello(who, hello.fields))
            while True:
                message = channel.receive()
                with self._lock:
                    if self._channels.get(who) is not channel:
                        return
                    self._handle(who, message)
        except WireError as error:
            _log.info("rendezvous: %s: %s", who, error)
        finally:
            self._slots.release()
            if channel is not None:
                channel.close()
            with self._lock:
                if who is not None and self._channels.get(who) is channel:
                    del self._channels[who]
                    self._deliver(self.coordinator.lost(who))

    def _refuse(self, channel: Channel, who: RankId, field: str, theirs: object, ours: object) -> None:
        text = f"refused {who.replica} rank {who.rank}: its {field} is {theirs}, the run has {ours}"
        _log.warning(text)
        self._deliver([Send(None, "notice", {"text": text})])
        channel.send("refuse", {"field": field, "yours": theirs, "ours": ours})

    def _handle(self, who: RankId, message: Message) -> None:
        if message.kind not in _KINDS or not _valid(message.fields, _KINDS[message.kind]):
            raise WireError(f"message {message.kind} is unknown or malformed")
        coordinator, now = self.coordinator, time.monotonic()
        if message.kind == "arrived":
            self._deliver(coordinator.arrived(who, message.fields, now))
        elif message.kind == "have":
            self._deliver(coordinator.have(who, message.fields, now))
        elif message.kind == "bad":
            _log.warning("%s refused a frame: %s", who, message.fields)
            self._deliver(coordinator.bad(who, message.fields, now))
        elif message.kind == "synced":
            self._deliver(coordinator.synced(who))
        else:
            self._deliver(coordinator.resync(who))

    def _deliver(self, sends: list[Send]) -> None:
        for send in sends:
            if send.kind == "commit":
                self._record(send.fields)
            for who in [send.to] if send.to is not None else list(self._channels):
                channel = self._channels.get(who)
                if channel is None:
                    continue
                try:
                    channel.send(send.kind, send.fields)
                except WireError as error:
                    _log.info("rendezvous: %s: %s", who, error)

    def _record(self, record: dict[str, Any]) -> None:
        if self._log_path is None:
            return
        with self._log_path.open("a") as log:
            log.write(json.dumps(record, sort_keys=True) + "\n")
            log.flush()
            os.fsync(log.fileno())


def _valid(fields: dict[str, Any], schema: dict[str, type]) -> bool:
    """All fields are there with their types; digests and shard maps map text to text."""
    for name, kind in schema.items():
        value = fields.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        if kind is int and not 0 <= value < 1 << 40:
            return False
        if name != "notes" and kind is dict and not all(isinstance(v, str) for v in value.values()):
            return False
    return True


def serve(
    config: EveryStep | DiLoCo | SparseLoCo, *, log_path: str | os.PathLike[str] | None = None
) -> Rendezvous:
    """The service that `config.peers` and its method ask for, at `peers.rendezvous`. Raises ConfigError."""
    check_sync(config)
    peers = config.peers
    if peers is None:
        raise ConfigError("sync.peers", None, "must be given to serve a rendezvous")
    return Rendezvous(
        parse_address("sync.peers.rendezvous", peers.rendezvous),
        load_token(peers.token_file),
        peers.num_replicas,
        WaitPolicy(peers.min_wait_s, peers.max_wait_s, peers.lateness_factor),
        log_path=log_path,
        planner=LinkPlanner(config) if isinstance(config, SparseLoCo) and config.adapt else None,
    )
