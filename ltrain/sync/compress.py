"""Compress a tensor to its largest, quantised entries, and back: pure functions, CPU and GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ltrain.sync import quantise
from ltrain.sync.payload import Payload
from ltrain.sync.topk import Chunking, select


def compress(x: Tensor, *, density: float, bits: int = 2, chunk: int = 4096, square: bool = False) -> Payload:
    """Keep the round(density x chunk) largest magnitudes of every chunk, each in `bits` bits.

    bits 2 is the published table, 1 a sign with a float16 scale a chunk, 16 bfloat16, 32 the value itself.
    `square` cuts matrices into sqrt(chunk) x sqrt(chunk) blocks as published instead of runs. Equal
    magnitudes are kept in order of position. What is not sent is `x - decompress(payload)`: with bits 32 the
    entries sent leave exactly nothing. Raises ValueError on values that are not finite, on a density outside
    (0, 1], on another number of bits and on a dtype that is not floating point.

    Source: SparseLoCo, arXiv 2508.15706, section 3.
    """
    if bits not in quantise.BITS:
        raise ValueError(f"bits={bits} must be one of {quantise.BITS}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"x.dtype={x.dtype} must be a floating point type")
    chunking = Chunking.of(tuple(x.shape), density, chunk, square)
    x = x.detach()
    indices, values = select(chunking.to_chunks(x).to(torch.float32), chunking)
    none = torch.zeros(0, dtype=torch.float16, device=x.device)
    if bits == 1:
        codes, scales, exponent = quantise.encode_signs(values, chunking.values_per_chunk(x.device))
    elif bits == 2:
        codes, scales, exponent = quantise.encode_table(values)
    else:
        codes, scales, exponent = values.to(torch.bfloat16 if bits == 16 else torch.float32), none, 0
        if codes is x or codes.data_ptr() == x.data_ptr():
            codes = codes.clone()
    return Payload(chunking, bits, x.dtype, indices, codes, scales, exponent)


def sparse_values(payload: Payload) -> tuple[Tensor, Tensor]:
    """(positions int64 in the flattened tensor, decoded values float32), each position once."""
    chunking = payload.chunking
    counts = chunking.values_per_chunk(payload.codes.device)
    values = quantise.decode(payload.bits, payload.codes, payload.scales, payload.exponent, counts)
    return chunking.positions(payload.indices), values


def decompress(payload: Payload) -> Tensor:
    """The tensor that `payload` stands for: zeros but for its values; shape and dtype of the original.

    The same bits on the sender and on every receiver.
    """
    positions, values = sparse_values(payload)
    flat = torch.zeros(payload.chunking.numel, dtype=torch.float32, device=values.device)
    flat[positions] = values
    return flat.view(payload.shape).to(payload.dtype)
