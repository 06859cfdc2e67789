"""Bytes from outside: whatever is cut, flipped, grown or forged is refused with PayloadError."""

import hashlib
import random
import struct
import tracemalloc

import pytest
import torch

from ltrain.sync import Payload, PayloadError, compress, decompress
from ltrain.sync.payload import _DIGEST_BYTES, _HEADER


def _payloads() -> list[bytes]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 130, generator=generator), torch.randn(128, 64, generator=generator)
    made = [compress(x, density=d, bits=b, chunk=512) for d in (0.02, 1.0) for b in (1, 2, 16, 32)]
    made += [compress(y, density=0.02, bits=2, square=True)]
    return [payload.to_bytes() for payload in made]


def _sign(data: bytes) -> bytes:
    """A forger's digest: every check behind it has to hold on its own."""
    body = bytearray(data[:-_DIGEST_BYTES])
    body[_HEADER.size - 8 : _HEADER.size] = struct.pack("<Q", len(data))
    return bytes(body) + hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()


def test_every_cut_is_refused():
    for data in _payloads():
        for size in {*range(0, 80), *range(80, len(data), max(1, len(data) // 40))}:
            if size < len(data):
                with pytest.raises(PayloadError):
                    Payload.from_bytes(data[:size])
        for extra in (b"\0", b"\0" * 100):
            with pytest.raises(PayloadError):
                Payload.from_bytes(data + extra)


def test_every_bit_flip_is_refused():
    generator = random.Random(1)
    for data in _payloads():
        for _ in range(60):
            damaged = bytearray(data)
            damaged[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            with pytest.raises(PayloadError):
                Payload.from_bytes(bytes(damaged))


def test_forged_bytes_never_crash_and_never_decode_to_nonsense():
    generator = random.Random(2)
    refused = accepted = 0
    for data in _payloads():
        for trial in range(120):
            damaged = bytearray(data)
            for _ in range(generator.randint(1, 4)):
                where = generator.randrange(_HEADER.size + 16 if trial % 2 else len(data) - _DIGEST_BYTES)
                damaged[where] = generator.randrange(256)
            try:
                payload = Payload.from_bytes(_sign(bytes(damaged)))
            except PayloadError:
                refused += 1
                continue
            accepted += 1
            limits = payload.chunking.values_per_chunk()
            assert payload.indices.min() >= 0 and payload.indices.max() < payload.chunking.chunk
            assert len(payload.indices) == int(limits.sum())
            if payload.chunking.numel < 1 << 22:
                values = decompress(payload)
                assert torch.isfinite(values.float()).all() or values.dtype != torch.float32
    assert refused > 400 and accepted > 0


def _forge(data: bytes, **fields: int) -> bytes:
    names = ["magic", "version", "bits", "flags", "dtype", "ndim", "rice", "plane_rice", "exponent", "chunk",
             "k", "unary", "plane_unary", "length"]  # fmt: skip
    header = dict(zip(names, _HEADER.unpack_from(data), strict=True)) | fields
    return _sign(_HEADER.pack(*header.values()) + data[_HEADER.size :])


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 2}, {"bits": 3}, {"bits": 32}, {"flags": 4}, {"flags": 2}, {"flags": 1}, {"dtype": 9},
        {"ndim": 9}, {"ndim": 0}, {"rice": 63}, {"rice": 0}, {"plane_rice": 1}, {"plane_unary": 5},
        {"exponent": 32000}, {"exponent": -200}, {"chunk": 0}, {"chunk": 1 << 31}, {"k": 0}, {"k": 513},
        {"unary": 0}, {"unary": 1 << 62}, {"k": 11},
    ],
)  # fmt: skip
def test_each_header_field_is_checked(fields):
    data = _payloads()[0]
    with pytest.raises(PayloadError):
        Payload.from_bytes(_forge(data, **fields))


def test_scales_must_be_finite_and_not_negative():
    data = compress(torch.randn(1024), density=0.1, bits=1, chunk=512).to_bytes()
    at = _HEADER.size + 8
    for scale in (float("nan"), float("inf"), -1.0):
        damaged = data[:at] + struct.pack("<e", scale) + data[at + 2 :]
        with pytest.raises(PayloadError, match="scale"):
            Payload.from_bytes(_sign(damaged))
    for bits, code in ((32, "<f"), (16, None)):
        data = compress(torch.randn(1024), density=0.1, bits=bits, chunk=512).to_bytes()
        value = struct.pack(code, float("nan")) if code else b"\xff\x7f"
        with pytest.raises(PayloadError, match="finite"):
            Payload.from_bytes(_sign(data[:at] + value + data[at + len(value) :]))


@pytest.mark.parametrize("dims", [(1 << 62,), (1 << 40, 1 << 20), (1 << 20, 1 << 20)])
def test_a_huge_shape_costs_no_memory(dims):
    data = compress(torch.randn(*([4] * len(dims))), density=1.0, bits=1).to_bytes()
    shape = struct.pack(f"<{len(dims)}Q", *dims)
    forged = _sign(data[: _HEADER.size] + shape + data[_HEADER.size + len(shape) :])
    tracemalloc.start()
    with pytest.raises(PayloadError, match="does not fit"):
        Payload.from_bytes(forged)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 16


def test_nothing_but_a_payload_is_parsed():
    generator = random.Random(3)
    for size in (0, 1, 51, 200, 5000):
        with pytest.raises(PayloadError):
            Payload.from_bytes(generator.randbytes(size))
    with pytest.raises(PayloadError):
        Payload.from_bytes(b"\x80\x04\x95" + b"cos\nsystem\n" * 20)
