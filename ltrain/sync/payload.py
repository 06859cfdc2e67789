"""One tensor's payload and its bytes. The parser trusts nothing: sizes, ranges, scales, digest are checked.

Layout, little endian: header | dims u64 x ndim | scales f16 | values | indices (unary, remainders) | digest.
`values` is one bit, two bit planes, or raw floats each. `digest` is BLAKE2b-64 over all that precedes it; it
finds damage, the transport's authentication finds forgery.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ltrain.sync.bits import BitError, RiceStream, fields_size, rice_decode, rice_encode
from ltrain.sync.bits import unpack_fields as unpack
from ltrain.sync.quantise import BITS, EXPONENTS
from ltrain.sync.topk import Chunking

_MAGIC, _VERSION = b"LTSP", 1
# magic, version, bits, flags, dtype, ndim, index rice, plane rice, exponent, chunk, k, index unary bytes,
# plane unary bytes, length of everything
_HEADER = struct.Struct("<4sHBBBBBBhIIQQQ")
_DIGEST_BYTES = 8
_SQUARE, _SPARSE_PLANE = 1, 2
_MAX_NDIM = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class PayloadError(ValueError):
    """The bytes are no payload that an encoder of this version writes."""


@dataclass(frozen=True, eq=False)
class Payload:
    """The sparse, quantised form of one tensor.

    indices: in-chunk index of every value, int32 [num_values], ascending inside a chunk. codes: uint8
    (bits 1: set for negative; bits 2: table entry) or the floats themselves (bits 16: bfloat16, 32:
    float32). scales: float16, one a chunk (bits 1), four a tensor (bits 2), none otherwise; each times
    2^exponent. dtype: of the tensor that `decompress` returns.
    """

    chunking: Chunking
    bits: int
    dtype: torch.dtype
    indices: Tensor
    codes: Tensor
    scales: Tensor
    exponent: int

    @property
    def num_values(self) -> int:
        return self.chunking.num_values

    @property
    def shape(self) -> tuple[int, ...]:
        return self.chunking.shape

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: the length of `to_bytes()`."""
        return len(self.to_bytes())

    @cached_property
    def sections(self) -> dict[str, int]:
        """Bytes by section: header, scales, values, indices, digest."""
        return {name: len(part) for name, part in self._encode().items()}

    def to_bytes(self) -> bytes:
        """The payload's wire form. Deterministic: equal payloads give equal bytes."""
        return self._bytes

    @cached_property
    def _bytes(self) -> bytes:
        return b"".join(self._encode().values())

    def _encode(self) -> dict[str, bytes]:
        chunking = self.chunking
        scales = self.scales.cpu().numpy().astype("<f2").tobytes()
        plane = RiceStream(0, b"", b"")
        flags = _SQUARE if chunking.square else 0
        codes = self.codes.cpu()
        if self.bits == 1:
            values = np.packbits(codes.numpy()).tobytes()
        elif self.bits == 2:
            table = codes.numpy()
            values, minor = np.packbits(table >> 1).tobytes(), _minor_plane(table)
            # The outer two table entries are mostly rare: then their positions are shorter than a plane.
            exceptions = rice_encode(np.diff(np.flatnonzero(minor), prepend=-1) - 1)
            if exceptions.nbytes + 8 < fields_size(len(table), 1):
                flags |= _SPARSE_PLANE
                plane = exceptions
                values += struct.pack("<Q", int(minor.sum())) + plane.unary + plane.remainders
            else:
                values += np.packbits(minor).tobytes()
        elif self.bits == 16:
            values = codes.view(torch.int16).numpy().astype("<i2").tobytes()
        else:
            values = codes.numpy().astype("<f4").tobytes()
        stream = RiceStream(0, b"", b"") if chunking.dense else rice_encode(self._gaps())
        dims = struct.pack(f"<{len(chunking.shape)}Q", *chunking.shape)
        length = _HEADER.size + len(dims) + len(scales) + len(values) + stream.nbytes + _DIGEST_BYTES
        header = _HEADER.pack(
            _MAGIC, _VERSION, self.bits, flags, _DTYPES.index(self.dtype), len(chunking.shape),
            stream.rice, plane.rice, self.exponent, chunking.chunk, chunking.k,
            len(stream.unary), len(plane.unary), length,
        )  # fmt: skip
        parts = {
            "header": header + dims,
            "scales": scales,
            "values": values,
            "indices": stream.unary + stream.remainders,
        }
        return parts | {"digest": _digest(b"".join(parts.values()))}

    def _gaps(self) -> np.ndarray:
        """Distance less one from the previous index of the chunk, from -1 for the first."""
        indices = self.indices.cpu().numpy().astype(np.int64)
        gaps = np.diff(indices, prepend=-1) - 1
        gaps[:: self.chunking.k] = indices[:: self.chunking.k]
        return gaps

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Payload:
        """Parse a payload. Raises PayloadError on anything an encoder would not have written.

        Memory stays within a small multiple of `len(data)`; compare `shape` with what is expected before
        `decompress`, which allocates the whole tensor.
        """
        try:
            return _parse(cls, memoryview(data).cast("B"))
        except (BitError, struct.error) as error:
            raise PayloadError(str(error)) from error


def _minor_plane(codes: np.ndarray) -> np.ndarray:
    """1 where a 2-bit code is one of the outer table entries (0 and 2 beside 1 and 3)."""
    return ((codes & 1) ^ 1).astype(np.uint8)


def _digest(data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise PayloadError(text)


def _parse(cls: type[Payload], data: memoryview) -> Payload:
    _require(len(data) >= _HEADER.size + _DIGEST_BYTES, f"{len(data)} bytes are too few for a payload")
    (magic, version, bits, flags, dtype, ndim, rice, plane_rice, exponent, chunk, k, unary, plane_unary,
     length) = _HEADER.unpack_from(data)  # fmt: skip
    _require(magic == _MAGIC, "not a payload: wrong magic number")
    _require(version == _VERSION, f"version {version} is not {_VERSION}")
    _require(length == len(data), f"the header says {length} bytes, there are {len(data)}")
    _require(_digest(data[:-_DIGEST_BYTES]) == bytes(data[-_DIGEST_BYTES:]), "the digest does not match")
    _require(bits in BITS, f"bits={bits} must be one of {BITS}")
    _require(flags & ~(_SQUARE | _SPARSE_PLANE) == 0, f"unknown flags {flags}")
    _require(not flags & _SPARSE_PLANE or bits == 2, "a sparse plane needs two bits")
    _require(dtype < len(_DTYPES), f"unknown dtype {dtype}")
    _require(ndim <= _MAX_NDIM, f"{ndim} dimensions are more than {_MAX_NDIM}")
    _require(1 <= chunk <= 1 << 16 and 1 <= k <= chunk, f"chunk={chunk}, k={k} are out of range")
    _require(exponent in EXPONENTS, f"exponent={exponent} is out of range")
    reader = _Reader(data[_HEADER.size : -_DIGEST_BYTES])
    shape = struct.unpack(f"<{ndim}Q", reader.take(8 * ndim))
    chunking = Chunking(shape, chunk, k)
    # Every value takes a bit at least, so a length bounds all that is allocated below.
    _require(chunking.num_values <= 8 * len(data), f"shape {shape} does not fit in {len(data)} bytes")
    if flags & _SQUARE:
        chunking = Chunking.of(shape, k / chunk, chunk, square=True)
        _require(chunking.square and chunking.k == k, f"shape {shape} has no square chunks of {chunk}")
    count = chunking.num_values
    num_scales = {1: chunking.num_chunks, 2: 4}.get(bits, 0)
    scales = np.frombuffer(reader.take(2 * num_scales), dtype="<f2")
    _require(bool(np.isfinite(scales).all()), "a scale is not finite")
    _require(bits != 1 or not bool(np.signbit(scales).any()), "a scale is negative")
    _require(bits in (1, 2) or exponent == 0, "floats have no exponent")
    codes = _parse_values(reader, bits, count, plane_rice, plane_unary, bool(flags & _SPARSE_PLANE))
    stream = RiceStream(rice, bytes(reader.take(unary)), bytes(reader.rest()))
    if chunking.dense:
        _require(stream == RiceStream(0, b"", b""), "a dense payload has no indices")
        indices = np.arange(count, dtype=np.int64) % chunk
    else:
        indices = _parse_indices(stream, chunking)
    return cls(
        chunking,
        bits,
        _DTYPES[dtype],
        torch.from_numpy(indices.astype(np.int32)),
        codes,
        torch.from_numpy(scales.astype(np.float16)),
        exponent,
    )


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def take(self, size: int) -> memoryview:
        _require(size <= len(self._data) - self._at, "the payload ends early")
        self._at += size
        return self._data[self._at - size : self._at]

    def rest(self) -> memoryview:
        return self.take(len(self._data) - self._at)


def _parse_values(
    reader: _Reader, bits: int, count: int, plane_rice: int, plane_unary: int, sparse_plane: bool
) -> Tensor:
    _require(sparse_plane or (plane_rice == 0 and plane_unary == 0), "a plane that is not there has sizes")
    if bits == 16:
        halves = np.frombuffer(reader.take(2 * count), dtype="<i2").astype(np.int16)
        values = torch.from_numpy(halves).view(torch.bfloat16)
        _require(bool(torch.isfinite(values).all()), "a value is not finite")
        return values
    if bits == 32:
        values = torch.from_numpy(np.frombuffer(reader.take(4 * count), dtype="<f4").astype(np.float32))
        _require(bool(torch.isfinite(values).all()), "a value is not finite")
        return values
    high = unpack(reader.take(fields_size(count, 1)), count, 1)
    if bits == 1:
        return torch.from_numpy(high.astype(np.uint8))
    if not sparse_plane:
        minor = unpack(reader.take(fields_size(count, 1)), count, 1)
    else:
        (exceptions,) = struct.unpack("<Q", reader.take(8))
        _require(exceptions <= count, f"{exceptions} exceptions among {count} values")
        unary = bytes(reader.take(plane_unary))
        remainders = bytes(reader.take(fields_size(exceptions, plane_rice)))
        gaps = rice_decode(RiceStream(plane_rice, unary, remainders), exceptions)
        _require(not len(gaps) or int(gaps.max()) < count, "an exception is out of range")
        at = np.cumsum(gaps + 1) - 1
        _require(not len(at) or int(at[-1]) < count, "an exception is out of range")
        minor = np.zeros(count, dtype=np.int64)
        minor[at] = 1
    return torch.from_numpy(((high << 1) | (minor ^ 1)).astype(np.uint8))


def _parse_indices(stream: RiceStream, chunking: Chunking) -> np.ndarray:
    gaps = rice_decode(stream, chunking.num_values)
    _require(int(gaps.max()) < chunking.chunk, "an index is out of its chunk")
    full = chunking.num_full * chunking.k
    indices = np.empty(chunking.num_values, dtype=np.int64)
    np.cumsum(gaps[:full].reshape(-1, chunking.k) + 1, axis=1, out=indices[:full].reshape(-1, chunking.k))
    indices[full:] = np.cumsum(gaps[full:] + 1)
    indices -= 1
    last = indices[chunking.k - 1 : full : chunking.k]
    _require(not len(last) or int(last.max()) < chunking.chunk, "an index is out of its chunk")
    _require(full == len(indices) or int(indices[-1]) < chunking.tail, "an index is out of its chunk")
    return indices
