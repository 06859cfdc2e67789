"""A replica's contribution to a round for one shard of the parameters: its tensors' payloads, as bytes."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass

from torch import Tensor

from ltrain.sync.payload import Payload, PayloadError

_MAGIC, _VERSION = b"LTSF", 1
# magic, version, flags, fingerprint of the run, round, tensors, length of everything
_HEADER = struct.Struct("<4sHHQQIQ")
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class RunIdentity:
    """What all replicas of a run agree on, by name, and its fingerprint.

    `shards` gives for every shard the names and shapes of its tensors, in order of name: the tensors that one
    rank of a replica owns and exchanges with the ranks that own the same ones elsewhere.
    """

    fields: dict[str, str]
    shards: dict[str, dict[str, tuple[int, ...]]]

    @classmethod
    def of(cls, fields: dict[str, object], shards: dict[str, dict[str, Tensor]]) -> RunIdentity:
        """The identity of a run from its agreed settings and the tensors of the shards held here."""
        shapes = {
            shard: {name: tuple(tensors[name].shape) for name in sorted(tensors)}
            for shard, tensors in sorted(shards.items())
        }
        return cls({name: str(value) for name, value in sorted(fields.items())}, shapes)

    def shard_digest(self, shard: str) -> str:
        """Digest of the names and shapes of a shard."""
        return hashlib.sha256(json.dumps(self.shards[shard]).encode()).hexdigest()[:16]

    @property
    def fingerprint(self) -> int:
        """64 bits over the agreed settings."""
        digest = hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).digest()
        return int.from_bytes(digest[:8], "little")

    def largest_frame(self, shard: str) -> int:
        """No honest frame of the shard is longer: every entry in float32, plus headers."""
        entries = sum(_numel(shape) for shape in self.shards[shard].values())
        return 8 * entries + 256 * len(self.shards[shard]) + _HEADER.size


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def write_frame(identity: RunIdentity, shard: str, round_: int, payloads: dict[str, Payload]) -> bytes:
    """The frame of `payloads`, which hold every tensor of the shard."""
    bodies = [payloads[name].to_bytes() for name in identity.shards[shard]]
    parts = [part for body in bodies for part in (_LENGTH.pack(len(body)), body)]
    length = _HEADER.size + sum(len(part) for part in parts)
    header = _HEADER.pack(_MAGIC, _VERSION, 0, identity.fingerprint, round_, len(bodies), length)
    return b"".join([header, *parts])


def read_frame(identity: RunIdentity, shard: str, round_: int, data: bytes) -> dict[str, Payload]:
    """Parse and check a frame: run, round, number and shapes of tensors, and every payload.

    Raises PayloadError that names the field, what came and what was expected.
    """
    view = memoryview(data)
    if len(view) < _HEADER.size:
        raise PayloadError(f"{len(view)} bytes are too few for a frame")
    magic, version, flags, fingerprint, frame_round, count, length = _HEADER.unpack_from(view)
    shapes = identity.shards[shard]
    for name, got, expected in (
        ("magic", magic, _MAGIC),
        ("version", version, _VERSION),
        ("flags", flags, 0),
        ("length", length, len(view)),
        ("run", fingerprint, identity.fingerprint),
        ("round", frame_round, round_),
        ("tensors", count, len(shapes)),
    ):
        if got != expected:
            raise PayloadError(f"frame {name} is {got}, expected {expected}")
    at, payloads = _HEADER.size, {}
    for name, shape in shapes.items():
        if at + _LENGTH.size > len(view):
            raise PayloadError(f"the frame ends before tensor {name}")
        (size,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size
        if size > len(view) - at:
            raise PayloadError(f"tensor {name} is longer than its frame")
        try:
            payload = Payload.from_bytes(view[at : at + size])
        except PayloadError as error:
            raise PayloadError(f"tensor {name}: {error}") from error
        if payload.shape != shape:
            raise PayloadError(f"tensor {name} has shape {payload.shape}, expected {shape}")
        payloads[name] = payload
        at += size
    if at != len(view):
        raise PayloadError(f"{len(view) - at} bytes after the last tensor")
    return payloads
