"""What is sent, how it is coded, and how long it is."""

import hashlib
import math

import numpy as np
import pytest
import torch

from ltrain.sync import Payload, compress, decompress
from ltrain.sync.bits import BitError, RiceStream, pack_fields, rice_decode, rice_encode, unpack_fields
from ltrain.sync.topk import Chunking, select_largest


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _entropy_bits(k: int, chunk: int = 4096) -> float:
    """log2 C(chunk, k) / k: no code of the index set is shorter on average."""
    return (math.lgamma(chunk + 1) - math.lgamma(k + 1) - math.lgamma(chunk - k + 1)) / math.log(2) / k


@pytest.mark.parametrize("bits", [1, 2, 16, 32])
@pytest.mark.parametrize(
    ("shape", "density", "chunk", "square"),
    [
        ((128, 192), 64 / 4096, 4096, True),
        ((128, 192), 64 / 4096, 4096, False),
        ((10_000,), 0.03, 4096, False),
        ((7, 11, 13), 0.1, 128, False),
        ((63,), 0.5, 64, False),
        ((1,), 0.01, 4096, False),
        ((), 1.0, 4096, False),
        ((0, 4), 0.5, 16, False),
        ((300,), 1.0, 64, False),
        ((256, 64), 1.0, 4096, True),
    ],
)
def test_bytes_round_trip(shape, density, chunk, square, bits):
    x = _normal(*shape)
    payload = compress(x, density=density, bits=bits, chunk=chunk, square=square)
    data = payload.to_bytes()
    received = Payload.from_bytes(data)
    assert torch.equal(decompress(payload), decompress(received))
    assert received.to_bytes() == data and payload.nbytes == len(data) == sum(payload.sections.values())
    assert torch.equal(payload.indices, received.indices) and torch.equal(payload.codes, received.codes)
    assert decompress(received).shape == x.shape and decompress(received).dtype == x.dtype


def test_the_largest_of_every_chunk_travel():
    x = _normal(3 * 256 + 40)
    sent = decompress(compress(x, density=16 / 256, bits=32, chunk=256))
    for start in range(0, len(x), 256):
        part = x[start : start + 256]
        expected = torch.zeros_like(part)
        top = part.abs().topk(16).indices
        expected[top] = part[top]
        assert torch.equal(sent[start : start + 256], expected)


def test_square_chunks_are_blocks_of_the_matrix():
    x = _normal(128, 64)
    sent = decompress(compress(x, density=5 / 4096, bits=32, square=True))
    for start in (0, 64):
        block = x[start : start + 64]
        keep = block.abs() >= block.abs().flatten().topk(5).values[-1]
        assert torch.equal(sent[start : start + 64], block * keep)


def test_ties_go_to_the_lower_index():
    x = torch.zeros(4, 64)
    x[1, 10:30] = torch.tensor([1.0, -1.0] * 10)
    x[2, 5], x[2, 20:60] = 3.0, 2.0
    x[3] = -0.0
    indices = select_largest(x, 4)
    assert indices.tolist() == [[0, 1, 2, 3], [10, 11, 12, 13], [5, 20, 21, 22], [0, 1, 2, 3]]
    rounded = _normal(32, 512).round(decimals=1)
    reference = torch.argsort(-rounded.abs(), dim=1, stable=True)[:, :33].sort(dim=1).values
    assert torch.equal(select_largest(rounded, 33).long(), reference)


def test_values_of_each_width():
    x = _normal(8192)
    exact = decompress(compress(x, density=1.0, bits=32))
    assert torch.equal(exact, x)
    assert torch.equal(decompress(compress(x, density=1.0, bits=16)), x.bfloat16().float())
    sign = decompress(compress(x, density=64 / 4096, bits=1)).view(2, 4096)
    for row, original in zip(sign, x.view(2, 4096), strict=True):
        kept = original[row != 0]
        assert torch.equal(row[row != 0].sign(), kept.sign())
        assert torch.unique(row.abs()).numel() == 2
        assert row.abs().max() == pytest.approx(kept.abs().mean().item(), rel=2**-11)


def test_two_bits_are_the_published_table():
    x = _normal(20_000)
    payload = compress(x, density=64 / 4096, bits=2)
    kept = compress(x, density=64 / 4096, bits=32).codes.double()
    mean, std = kept.mean(), kept.std(unbiased=False)
    codes = torch.clamp(torch.round((kept - mean) / (6 * std / 4) + 2), 0, 3).long()
    assert torch.equal(codes, payload.codes.long())
    table = torch.stack([kept[codes == c].mean() if (codes == c).any() else mean * 0 for c in range(4)])
    got = decompress(payload)
    positions = decompress(compress(x, density=64 / 4096, bits=32)).nonzero().flatten()
    torch.testing.assert_close(got[positions].double(), table[codes], rtol=2**-10, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-38, 1e-12, 1e-6, 1.0, 1e6, 1e30])
def test_scales_keep_their_precision_at_any_magnitude(scale):
    x = _normal(4096) * scale
    payload = compress(x, density=64 / 4096, bits=1)
    kept = compress(x, density=64 / 4096, bits=32).codes
    assert decompress(payload).abs().max().item() == pytest.approx(kept.abs().mean().item(), rel=1e-3)


@pytest.mark.parametrize("k", [16, 32, 64, 128, 256, 512, 1024])
def test_index_stream_is_within_five_percent_of_entropy(k):
    payload = compress(_normal(64 * 4096), density=k / 4096, bits=1)
    spent = 8 * payload.sections["indices"] / payload.num_values
    assert _entropy_bits(k) <= spent <= 1.05 * _entropy_bits(k)


@pytest.mark.parametrize("bits", [1, 2])
def test_nine_bits_a_value_all_told(bits):
    x = _normal(1024, 1024)
    data = compress(x, density=64 / 4096, bits=bits, square=True).to_bytes()
    assert 8 * len(data) <= 9 * (x.numel() // 64)
    assert 4 * x.numel() >= 220 * len(data)


def test_sign_payload_is_as_long_as_the_formula_says():
    payload = compress(_normal(50, 4096), density=64 / 4096, bits=1)
    indices = payload.indices.view(-1, 64).long()
    gaps = torch.cat([indices[:, :1], indices.diff(dim=1) - 1], dim=1)
    rice = min(
        math.ceil(((gaps >> b) + 1).sum().item() / 8) + math.ceil(gaps.numel() * b / 8) for b in range(9)
    )
    assert payload.sections["indices"] == rice
    assert payload.sections["values"] == 50 * 64 // 8 and payload.sections["scales"] == 2 * 50


def test_same_bytes_for_any_thread_count_and_stride():
    x = _normal(512, 512)
    digests = set()
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        for tensor in (x, x.t().contiguous().t()):
            data = compress(tensor, density=0.02, bits=1).to_bytes()
            digests.add(hashlib.sha256(data).hexdigest())
    torch.set_num_threads(threads)
    assert len(digests) == 1


def test_payload_does_not_alias_its_input():
    x = _normal(100)
    payload = compress(x, density=1.0, bits=32)
    before = decompress(payload)
    x.zero_()
    assert torch.equal(decompress(payload), before)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": float("nan")}, "density"),
        ({"density": 0.1, "bits": 3}, "bits"),
        ({"density": 0.1, "chunk": 0}, "chunk"),
        ({"density": 0.1, "chunk": 70_000}, "chunk"),
    ],
)
def test_arguments_out_of_range(arguments, word):
    with pytest.raises(ValueError, match=word):
        compress(torch.ones(8), **arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("density", [0.1, 1.0])
def test_values_that_are_not_finite_are_refused(bad, density):
    x = _normal(5000)
    x[4999] = bad
    with pytest.raises(ValueError, match="finite"):
        compress(x, density=density)
    with pytest.raises(ValueError, match="dtype"):
        compress(torch.ones(4, dtype=torch.int64), density=0.5)


def test_rice_and_fields_invert():
    generator = np.random.default_rng(0)
    for scale in (0.1, 3, 500):
        numbers = generator.geometric(1 / (1 + scale), 1000) - 1
        assert np.array_equal(rice_decode(rice_encode(numbers), 1000), numbers)
    for width in (0, 1, 5, 12):
        values = generator.integers(0, 1 << width, 77)
        assert np.array_equal(unpack_fields(pack_fields(values, width), 77, width), values)
    with pytest.raises(BitError, match="padding"):
        unpack_fields(b"\xff", 5, 1)
    with pytest.raises(BitError, match="unary"):
        rice_decode(RiceStream(0, b"\x00\x80", b""), 3)


def test_chunking_counts():
    chunking = Chunking.of((100,), 0.25, 32, square=True)
    assert (chunking.num_full, chunking.tail, chunking.k, chunking.num_values) == (3, 4, 8, 28)
    assert not chunking.square
    assert chunking.values_per_chunk().tolist() == [8, 8, 8, 4]
