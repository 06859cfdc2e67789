"""Runs a planned exchange forward and backward.

The forward pass streams: it holds the running (out, lse) and never more than the feed's buffers. The backward
pass fetches the keys and values again and uses the merged lse and the global delta = rowsum(out * dout) -
dlse, so that a partial call needs no state of its own (see docs/context_parallel.md).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ltrain.attention.schedules.base import Exchange, partial_dtype
from ltrain.attention.schedules.local import Partials, backward_step, forward_step
from ltrain.parallel.collectives import Traffic
from ltrain_kernels.block_sparse import attention_delta


class Schedule(Protocol):
    """What the autograd function calls. `kept` are tensors that save the backward pass an exchange; it works
    without."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, traffic: Traffic | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(out [B, T, N, Dv], lse [B, N, T], kept)."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        kept: tuple[Tensor, ...],
        scale: float,
        wire: torch.dtype,
        traffic: Traffic | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) in the types of q, k and v."""


class TokenSharded:
    """A schedule whose queries stay at home: an exchange of keys and values, and of their gradients."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, traffic: Traffic | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return *run_forward(self.exchange, q, k, v, scale, traffic), ()

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        kept: tuple[Tensor, ...],
        scale: float,
        wire: torch.dtype,
        traffic: Traffic | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        delta = make_delta(out, dout, lse, dlse)
        dq, dk, dv = run_backward(self.exchange, dout, q, k, v, delta, lse, scale, wire, traffic)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def tokens_first(x: Tensor) -> Tensor:
    """[B, T, H, D] -> contiguous [T, B, H, D]; a view where B is 1."""
    return x.transpose(0, 1).contiguous()


def run_forward(
    exchange: Exchange, q: Tensor, k: Tensor, v: Tensor, scale: float, traffic: Traffic | None
) -> tuple[Tensor, Tensor]:
    """(out [B, T, N, Dv] in q's type, lse [B, N, T]) of this rank's queries over every step's keys."""
    partials = Partials(q, v.shape[3])
    for number, keys, values in exchange.keys(tokens_first(k), tokens_first(v), traffic):
        step = exchange.steps[number]
        if traffic is not None:
            traffic.step_tiles.append(step.head_tiles(q.shape[0] * q.shape[2]))
        if step.tiles and q.numel():
            partials.add(*forward_step(q, keys, values, step, scale))
        # The feed is about to receive again: this buffer must not outlive its step.
        del keys, values
    return partials.out.to(q.dtype), partials.lse


def make_delta(out: Tensor, dout: Tensor, lse: Tensor, dlse: Tensor | None) -> Tensor:
    """The global delta [B, N, T]; a row without keys has lse -inf whatever q and k are."""
    return attention_delta(out, dout, None if dlse is None else torch.where(torch.isinf(lse), 0.0, dlse))


def run_backward(
    exchange: Exchange,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse: Tensor,
    scale: float,
    wire: torch.dtype,
    traffic: Traffic | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of this rank's shards, fp32 (fp64 for fp64 inputs)."""
    dq = torch.zeros(q.shape, dtype=partial_dtype(q.dtype), device=q.device)
    own_k, own_v = tokens_first(k), tokens_first(v)
    sink = exchange.gradients(own_k, own_v, wire, traffic)
    for number, keys, values in exchange.keys(own_k, own_v, traffic):
        step = exchange.steps[number]
        if step.tiles and q.numel():
            dk, dv = backward_step(dout, q, keys, values, delta, lse, step, scale, dq)
        else:
            dk, dv = (torch.zeros(x.shape, dtype=dq.dtype, device=q.device) for x in (keys, values))
        sink.put(number, dk, dv)
        del keys, values, dk, dv
    dk, dv = sink.finish()
    return dq, dk.transpose(0, 1), dv.transpose(0, 1)
