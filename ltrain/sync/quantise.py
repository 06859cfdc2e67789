"""What a transmitted value becomes: the published 2-bit table, a sign with its chunk's scale, or a float.

Every scale is a float16 mantissa times one power of two for the tensor. A decoded value is therefore exact in
float32 on every device, and a float16 mantissa keeps its eleven bits whatever the size of the learning rate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BITS = (1, 2, 16, 32)
EXPONENTS = range(-100, 111)
# The published quantiser spreads four bins over six standard deviations.
_TABLE_BINS = 4
_TABLE_RANGE = 6.0


def to_half(scales: Tensor) -> tuple[Tensor, int]:
    """`scales` as (float16 mantissas, exponent): scale = mantissa x 2^exponent; the largest is near 2^9."""
    largest = float(scales.abs().max()) if scales.numel() else 0.0
    if largest == 0.0:
        return torch.zeros_like(scales, dtype=torch.float16), 0
    exponent = min(max(math.frexp(largest)[1] - 9, EXPONENTS.start), EXPONENTS.stop - 1)
    mantissas = (scales.double() * 2.0**-exponent).clamp(-65504.0, 65504.0)
    return mantissas.to(torch.float16), exponent


def from_half(mantissas: Tensor, exponent: int) -> Tensor:
    """Inverse of `to_half`, float32 and exact."""
    return mantissas.to(torch.float32) * 2.0**exponent


def encode_signs(values: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, int]:
    """Signs of `values` and the mean magnitude of every chunk: (codes uint8, scales float16, exponent).

    values: float32 [num_values] in chunk order; counts: values of every chunk, int64 [num_chunks].
    """
    num_chunks, k = len(counts), int(counts[0]) if len(counts) else 0
    means = torch.zeros(num_chunks, dtype=torch.float32, device=values.device)
    full = len(values) // k if k else 0
    means[:full] = values[: full * k].view(full, k).abs().mean(1) if full else 0.0
    if full < num_chunks:
        means[full:] = values[full * k :].abs().mean()
    scales, exponent = to_half(means)
    return (values < 0).to(torch.uint8), scales, exponent


def encode_table(values: Tensor) -> tuple[Tensor, Tensor, int]:
    """The published 2-bit code: (codes uint8 in 0..3, table of the four decoded values float16, exponent).

    Bins of width 6 sigma / 4 around the mean of all kept values of the tensor; a bin decodes to the mean of
    its values (SparseLoCo, arXiv 2508.15706, and its public code).
    """
    if values.numel() == 0:
        return (
            torch.zeros(0, dtype=torch.uint8, device=values.device),
            torch.zeros(_TABLE_BINS, dtype=torch.float16, device=values.device),
            0,
        )
    mean = values.mean()
    centred = values - mean
    width = centred.square().mean().sqrt() * (_TABLE_RANGE / _TABLE_BINS)
    width = torch.where(width > 0, width, torch.ones_like(width))
    codes = (centred / width + _TABLE_BINS // 2).round().clamp(0, _TABLE_BINS - 1).to(torch.int64)
    totals = torch.zeros(_TABLE_BINS, dtype=torch.float64, device=values.device)
    totals.index_add_(0, codes, values.double())
    counts = torch.bincount(codes, minlength=_TABLE_BINS)
    table, exponent = to_half((totals / counts.clamp(min=1)).float())
    return codes.to(torch.uint8), table, exponent


def decode(bits: int, codes: Tensor, scales: Tensor, exponent: int, counts: Tensor) -> Tensor:
    """Decoded values, float32 [num_values]; the same bits on every device."""
    if bits == 1:
        scale = torch.repeat_interleave(from_half(scales, exponent), counts)
        return torch.where(codes.bool(), -scale, scale)
    if bits == 2:
        return from_half(scales, exponent)[codes.to(torch.int64)]
    return codes.to(torch.float32)
