"""Bit streams: fixed-width fields and Rice-coded gaps, packed and unpacked without a Python loop (numpy)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# A gap is below 2^16 (the largest chunk) for indices, and below 2^40 for positions in a value stream.
MAX_RICE = 40


class BitError(ValueError):
    """A stream is not what its encoder would have written."""


def pack_fields(values: np.ndarray, width: int) -> bytes:
    """`values` (unsigned, each below 2^width) as consecutive big-endian fields of `width` bits."""
    if width == 0 or len(values) == 0:
        return b""
    shifts = np.arange(width - 1, -1, -1, dtype=np.uint64)
    bits = (values.astype(np.uint64)[:, None] >> shifts) & np.uint64(1)
    return np.packbits(bits.astype(np.uint8)).tobytes()


def fields_size(count: int, width: int) -> int:
    return -(-count * width // 8)


def unpack_fields(data: bytes | memoryview, count: int, width: int) -> np.ndarray:
    """Inverse of `pack_fields`, int64 [count]. Raises BitError on a wrong length or set padding bits."""
    if len(data) != fields_size(count, width):
        raise BitError(f"{len(data)} bytes cannot hold {count} fields of {width} bits")
    if width == 0 or count == 0:
        return np.zeros(count, dtype=np.int64)
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8))
    if bits[count * width :].any():
        raise BitError("padding bits are set")
    fields = bits[: count * width].reshape(count, width)
    value = np.zeros(count, dtype=np.int64)
    for column in range(width):
        value = (value << 1) | fields[:, column]
    return value


@dataclass(frozen=True)
class RiceStream:
    """Rice-coded numbers: the quotients in unary and the remainders in `rice` bits each, in two streams.

    The sizes are those of interleaved Rice codes; apart, both streams unpack as whole arrays.
    """

    rice: int
    unary: bytes
    remainders: bytes

    @property
    def nbytes(self) -> int:
        return len(self.unary) + len(self.remainders)


def rice_encode(numbers: np.ndarray) -> RiceStream:
    """Code non-negative `numbers` with the parameter that makes the stream shortest."""
    if len(numbers) == 0:
        return RiceStream(0, b"", b"")
    numbers = numbers.astype(np.int64)
    guess = int(math.log2(max(1.0, float(numbers.mean()) * math.log(2))))
    candidates = [b for b in range(guess - 1, guess + 3) if 0 <= b <= MAX_RICE]
    rice = min(candidates, key=lambda b: int((numbers >> b).sum()) + len(numbers) * b)
    ends = np.cumsum((numbers >> rice) + 1) - 1
    bits = np.zeros(int(ends[-1]) + 1, dtype=np.uint8)
    bits[ends] = 1
    return RiceStream(rice, np.packbits(bits).tobytes(), pack_fields(numbers & ((1 << rice) - 1), rice))


def rice_decode(stream: RiceStream, count: int) -> np.ndarray:
    """The `count` numbers of `stream`, int64. Raises BitError unless the encoder could have written it."""
    if not 0 <= stream.rice <= MAX_RICE:
        raise BitError(f"rice parameter {stream.rice} must be in 0..{MAX_RICE}")
    if count == 0:
        if stream.unary or stream.remainders:
            raise BitError("bytes after an empty stream")
        return np.zeros(0, dtype=np.int64)
    if count > 8 * len(stream.unary):
        raise BitError(f"{len(stream.unary)} bytes cannot hold {count} unary numbers")
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(stream.unary, dtype=np.uint8)))
    if len(ends) != count or int(ends[-1]) // 8 != len(stream.unary) - 1:
        raise BitError(f"the unary stream holds {len(ends)} numbers, not {count}, or ends late")
    quotients = np.diff(ends, prepend=-1) - 1
    if int(quotients.max()) > (1 << 62) >> stream.rice:
        raise BitError("a number is out of range")
    return (quotients << stream.rice) | unpack_fields(stream.remainders, count, stream.rice)
