"""Authenticated messages between processes over TCP. Nothing is unpickled and no length is trusted.

Both ends prove that they know the shared token (HMAC-SHA256 over both nonces) before anything else is read;
each message then carries a MAC over its direction, number and content under a key of the session, so that a
message cannot be forged, altered, replayed or reordered. Content is not encrypted: run over a private network
or a tunnel where it is confidential.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import select
import socket
import stat
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltrain.config.base import ConfigError

_MAGIC = b"LTW1"
_HEADER = struct.Struct("<4sIQ16s")
_NONCE = 16
_MAX_JSON = 4 << 20
_CHUNK = 1 << 20


class WireError(ConnectionError):
    """The other side is gone, too slow, or does not follow the protocol."""


@dataclass(frozen=True)
class Message:
    """A message: its kind, a JSON object, and bytes."""

    kind: str
    fields: dict[str, Any]
    body: bytes = b""


def load_token(path: str) -> bytes:
    """The shared secret. Raises ConfigError where the file is missing, short, or open to other users."""
    field = "sync.peers.token_file"
    try:
        token = Path(path).read_bytes().strip()
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError as error:
        raise ConfigError(
            field, path, f"cannot be read: {error.strerror}", "make it with `openssl rand -hex 32`"
        ) from error
    if len(token) < 16:
        raise ConfigError(field, path, "must hold at least 16 bytes", "make it with `openssl rand -hex 32`")
    if mode & 0o077:
        raise ConfigError(field, path, f"must be readable by its owner only, mode is {mode:o}", "chmod 600")
    return token


class Channel:
    """One authenticated connection. `send` may be called from several threads, `receive` from one."""

    def __init__(self, sock: socket.socket, key: bytes, *, client: bool, max_body: int) -> None:
        self._sock, self._key, self._max_body = sock, key, max_body
        self._out, self._in = (b"c", b"s") if client else (b"s", b"c")
        self._sent = self._received = 0
        self._lock = threading.Lock()
        self.bytes_sent = self.bytes_received = 0
        self.last_body_s = 0.0
        # A message of this label's sender is on its way in.
        self.busy, self.label = False, ""

    def send(self, kind: str, fields: dict[str, Any] | None = None, body: bytes = b"") -> None:
        """Send a message. Raises WireError when the connection fails or times out."""
        head = json.dumps({"kind": kind} | (fields or {})).encode()
        with self._lock:
            mac = self._mac(self._out, self._sent, head, body)
            header = _HEADER.pack(_MAGIC, len(head), len(body), mac)
            try:
                self._sock.sendall(header + head)
                if body:
                    self._sock.sendall(body)
            except OSError as error:
                self.close()
                raise WireError(f"send failed: {error}") from error
            self._sent += 1
            self.bytes_sent += len(header) + len(head) + len(body)

    def receive(self) -> Message:
        """The next message. Raises WireError on a closed connection, a timeout, or a bad message."""
        magic, head_size, body_size, mac = _HEADER.unpack(self._exactly(_HEADER.size))
        if magic != _MAGIC or head_size > _MAX_JSON or body_size > self._max_body:
            self.close()
            raise WireError(f"not a message, or too long ({head_size} + {body_size} bytes)")
        head = self._exactly(head_size)
        began = time.perf_counter()
        self.busy = body_size > 0
        body = self._exactly(body_size)
        self.busy = False
        self.last_body_s = time.perf_counter() - began
        if not hmac.compare_digest(mac, self._mac(self._in, self._received, head, body)):
            self.close()
            raise WireError("a message is damaged or forged")
        self._received += 1
        self.bytes_received += _HEADER.size + head_size + body_size
        try:
            fields = json.loads(head, parse_constant=_no_constant)
            return Message(str(fields.pop("kind")), fields, body)
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            self.close()
            raise WireError("a message has no valid header") from error

    def check_open(self) -> None:
        """Raise WireError if the other side, which is not expected to send, has closed the connection."""
        if select.select([self._sock], [], [], 0)[0]:
            self.close()
            raise WireError("the other side closed the connection")

    def limit_sends(self, seconds: float) -> None:
        """A send that cannot leave for so long fails; waiting in `receive` is not limited."""
        timeval = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)

    def settimeout(self, seconds: float | None) -> None:
        """Limit of each later wait for the network."""
        self._sock.settimeout(seconds)

    def close(self) -> None:
        """Close at once; a thread that waits in `receive` gets WireError."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _mac(self, direction: bytes, number: int, head: bytes, body: bytes) -> bytes:
        mac = hmac.new(self._key, direction + struct.pack("<QI", number, len(head)), hashlib.sha256)
        mac.update(head)
        mac.update(body)
        return mac.digest()[:16]

    def _exactly(self, size: int) -> bytes:
        return _exactly(self._sock, size)


def _exactly(sock: socket.socket, size: int) -> bytes:
    # Grown as bytes arrive: a length alone allocates nothing.
    data = bytearray()
    while len(data) < size:
        try:
            part = sock.recv(min(_CHUNK, size - len(data)))
        except OSError as error:
            raise WireError(f"receive failed: {error}") from error
        if not part:
            raise WireError("the other side closed the connection")
        data += part
    return bytes(data)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _proof(token: bytes, role: bytes, nonces: bytes) -> bytes:
    return hmac.new(token, role + nonces, hashlib.sha256).digest()


def connect(address: tuple[str, int], token: bytes, *, max_body: int = 0, timeout_s: float = 10.0) -> Channel:
    """Connect and authenticate both ways. Raises WireError."""
    try:
        sock = socket.create_connection(address, timeout=timeout_s)
    except OSError as error:
        raise WireError(f"cannot connect to {address[0]}:{address[1]}: {error}") from error
    try:
        return _handshake(sock, token, client=True, max_body=max_body)
    except (OSError, WireError) as error:
        sock.close()
        raise WireError(f"{address[0]}:{address[1]}: {error}") from error


def accept(sock: socket.socket, token: bytes, *, max_body: int = 0, timeout_s: float = 10.0) -> Channel:
    """Authenticate a connection that came in. Raises WireError."""
    try:
        sock.settimeout(timeout_s)
        return _handshake(sock, token, client=False, max_body=max_body)
    except (OSError, WireError) as error:
        sock.close()
        raise WireError(f"authentication failed: {error}") from error


def _handshake(sock: socket.socket, token: bytes, *, client: bool, max_body: int) -> Channel:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    mine = secrets.token_bytes(_NONCE)
    sock.sendall(_MAGIC + mine)
    hello = _exactly(sock, len(_MAGIC) + _NONCE)
    if hello[: len(_MAGIC)] != _MAGIC:
        raise WireError("the other side speaks another protocol")
    theirs = hello[len(_MAGIC) :]
    nonces = mine + theirs if client else theirs + mine
    roles = (b"client", b"server") if client else (b"server", b"client")
    # The client proves itself first: a stranger who dials in gets no answer to work on.
    if client:
        sock.sendall(_proof(token, roles[0], nonces))
    if not hmac.compare_digest(_exactly(sock, 32), _proof(token, roles[1], nonces)):
        raise WireError("the other side does not know the token")
    if not client:
        sock.sendall(_proof(token, roles[0], nonces))
    sock.settimeout(None)
    return Channel(sock, _proof(token, b"session", nonces), client=client, max_body=max_body)


def address_towards(address: tuple[str, int]) -> str:
    """This machine's address on the interface that leads to `address`. Raises ConfigError."""
    try:
        family, kind, _, _, resolved = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(resolved)  # of a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            "sync.peers.rendezvous", f"{address[0]}:{address[1]}", f"cannot be resolved: {error}"
        ) from error


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where the address cannot be used."""
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        raise ConfigError("sync.peers.host", f"{host}:{port}", f"cannot be listened at: {error}") from error
