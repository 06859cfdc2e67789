"""The attention half of a transformer layer, x + proj(attention(qkv(norm(x)))), with few bytes saved.

For the backward pass it saves x, the fused projection qkv, attention's output and the LSE, each once; the
norm, qk-norms and rotary embedding are recomputed around them, and no matrix product runs twice. Attention
is never run again, nor is its selection, plan or exchange: they are handed to the backward pass with the
output and the LSE. With `save_qkv=False` qkv isn't saved either and its product runs a second time. Where x
is some rows of a residual that the MLP half needs too, that residual is saved in its place.

Of a pattern with weights of its own, the output and LSE of each branch are saved, and what it fetched from
other ranks. Its own loss depends on nothing that follows, so the gradient is computed in the forward pass and
saved, once.

Shape legend: S tokens of this rank in the residual, T tokens that attention sees (S without sequence
parallelism), B batch, E hidden size, N query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltrain.attention.context import AttentionContext
from ltrain.attention.module import CoreAttention, Decisions
from ltrain.parallel.linear import (
    Gradients,
    column_forward,
    column_input,
    column_vjp,
    row_forward,
    row_vjp,
)
from ltrain.parallel.offload import HostCopy, HostStore
from ltrain.parallel.seam import outside_seam


@dataclass(frozen=True)
class Rebuild:
    """How to compute a tensor once more: `compute(*inputs)`, from tensors that are saved anyway."""

    inputs: tuple[Tensor, ...]
    compute: Callable[..., Tensor]


@dataclass(frozen=True)
class Cut:
    """Some rows of a residual [S, B, E]: `ids` int64, ascending, and `padding` rows of zeros after them."""

    ids: Tensor
    padding: int = 0

    def take(self, x: Tensor) -> Tensor:
        """The rows of x, in a new tensor."""
        return self.pad(x.index_select(0, self.ids))

    def put(self, x: Tensor, rows: Tensor) -> Tensor:
        """x with these rows in the place of its own, in a new tensor."""
        return x.index_copy(0, self.ids, self.trim(rows))

    def pad(self, rows: Tensor) -> Tensor:
        """Rows of `ids` and the zeros after them."""
        return nn.functional.pad(rows, (0, 0, 0, 0, 0, self.padding)) if self.padding else rows

    def trim(self, rows: Tensor) -> Tensor:
        """Without the zeros."""
        return rows[: len(self.ids)] if self.padding else rows


class AttentionHalf:
    """The attention half over the modules of an mcore layer: its input norm and its `SelfAttention`.

    The modules stay where they are; this object only computes with them. `core_attention` must be a
    `CoreAttention`. With a `store` x waits for the backward pass in host memory.
    """

    def __init__(
        self, norm: nn.Module, attention: Any, *, save_qkv: bool = True, store: HostStore | None = None
    ) -> None:
        if not isinstance(attention.core_attention, CoreAttention):
            raise TypeError(f"needs CoreAttention, not {type(attention.core_attention).__name__}")
        self.norm, self.attention, self.save_qkv, self.store = norm, attention, save_qkv, store
        self.head_norms = tuple(n for n in (attention.q_layernorm, attention.k_layernorm) if n is not None)
        learned = attention.core_attention.learned
        self.learned = () if learned is None else (learned,)
        self.parts = (norm, attention.linear_qkv, *self.head_norms, attention.linear_proj, *self.learned)

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """The pattern's own weights that have a gradient."""
        return tuple(p for module in self.learned for p in module.parameters() if p.requires_grad)

    def __call__(
        self, x: Tensor, context: AttentionContext, within: tuple[Tensor, Cut] | None = None
    ) -> tuple[Tensor, Rebuild]:
        """(y [S, B, E], how to rebuild y) of x [S, B, E], the tokens that `context` describes.

        `within` is a residual and the cut of it that x is: the residual is then saved in the place of x, and
        what is rebuilt is the residual with y in its rows.
        """
        parameters = [p for part in self.parts for p in part.parameters()]
        learn = torch.is_grad_enabled()
        source, cut = (x, None) if within is None else within
        source = source.detach()
        copy = self.store.put(source) if self.store is not None and learn else None
        saved = source if copy is None else None
        y, *branches = _AttentionHalf.apply(x, self, context, saved, copy, cut, learn, *parameters)

        def again(source: Tensor, *branches: Tensor) -> Tensor:
            if cut is None:
                return self.add_projection(source, *branches)
            return cut.put(source, self.add_projection(cut.take(source), *branches))

        if copy is not None:
            return y, Rebuild(tuple(branches), lambda *branches: again(copy.get(), *branches))
        return y, Rebuild((source, *branches), again)

    def add_projection(self, x: Tensor, *branches: Tensor) -> Tensor:
        """x + proj(attention's output)."""
        return row_forward(self.attention.linear_proj, self.output(branches)).add_(x)

    def output(self, branches: tuple[Tensor, ...]) -> Tensor:
        """Attention's output [T, B, N * D] from its branches."""
        return self.attention.core_attention.combine(branches).transpose(0, 1).flatten(2)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, N, D] and k, v [B, T, K, D], heads normed, from the fused projection [T, B, ...].

        The projection holds, for each kv head, its query heads, the key and the value.
        """
        attention = self.attention
        groups, dim = attention.num_query_groups_per_partition, attention.hidden_size_per_attention_head
        per_group = attention.num_attention_heads_per_partition // groups
        grouped = qkv.view(*qkv.shape[:2], groups, (per_group + 2) * dim)
        q, k, v = grouped.split((per_group * dim, dim, dim), dim=3)
        q = q.reshape(*q.shape[:2], groups * per_group, dim)
        if attention.q_layernorm is not None:
            q = attention.q_layernorm(q)
        if attention.k_layernorm is not None:
            k = attention.k_layernorm(k)
        return q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)

    def vjp(
        self,
        qkv: Tensor,
        saved: tuple[Tensor, ...],
        dout: Tensor,
        context: AttentionContext,
        decisions: Decisions,
        sums: Gradients,
    ) -> Tensor:
        """Gradient of qkv [T, B, ...] for that of out [T, B, N * D]; adds those of the head norms and of the
        pattern's own weights to `sums`."""
        qkv = qkv.detach().requires_grad_()
        weights = [p for norm in self.head_norms for p in norm.parameters() if p.requires_grad]
        weights += self.trained
        with torch.enable_grad():
            again = self.attention.core_attention.attend(
                *self.heads(qkv), context, decisions=decisions, saved=saved
            )
            out = self.output(again.branches)
        # A gate that only chooses blocks has no part in the output.
        dqkv, *dweights = torch.autograd.grad(out, (qkv, *weights), dout, allow_unused=True)
        for weight, gradient in zip(weights, dweights, strict=True):
            if gradient is not None:
                sums.add(weight, gradient)
        return dqkv


class _AttentionHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        half: AttentionHalf,
        context: AttentionContext,
        source: Tensor | None,
        copy: HostCopy | None,
        cut: Cut | None,
        learn: bool,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, ...]:
        linear = half.attention.linear_qkv
        normed = half.norm(x)
        qkv = column_forward(linear, normed, column_input(linear, normed))
        done = half.attention.core_attention.attend(*half.heads(qkv), context, learn=learn)
        lessons: tuple[Tensor, ...] = ()
        if done.loss is not None and half.trained:
            loss, weight = done.loss
            lessons = torch.autograd.grad(loss, half.trained, torch.full_like(loss, weight))
        ctx.half, ctx.context, ctx.copy, ctx.cut, ctx.parameters = half, context, copy, cut, parameters
        ctx.decisions, ctx.counts = done.decisions, (len(done.branches), len(done.saved), len(lessons))
        ctx.save_for_backward(source, qkv if half.save_qkv else None, *done.branches, *done.saved, *lessons)
        ctx.mark_non_differentiable(*done.branches)
        return half.add_projection(x, *done.branches), *done.branches

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        with outside_seam():
            dx, sums = _backward(ctx, dy)
            if ctx.copy is not None:
                ctx.copy.drop()
        return dx, None, None, None, None, None, None, *sums.take()


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Gradients]:
    source, qkv, *rest = ctx.saved_tensors
    branches, saved, lessons = (tuple(part) for part in _split(rest, ctx.counts))
    del rest
    x = ctx.copy.get() if source is None else source
    x = x if ctx.cut is None else ctx.cut.take(x)
    half, sums = ctx.half, Gradients(ctx.parameters)
    linear = half.attention.linear_qkv
    dout = row_vjp(half.attention.linear_proj, half.output(branches), dy, sums)
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        normed = half.norm(x)
    n = normed.detach()
    whole = column_input(linear, n) if qkv is None or linear.weight.requires_grad else None
    if qkv is None:
        qkv = column_forward(linear, n, whole)
    dqkv = half.vjp(qkv, saved, dout, ctx.context, ctx.decisions, sums)
    for weight, gradient in zip(half.trained if lessons else (), lessons, strict=True):
        sums.add(weight, gradient)
    del qkv, branches, saved, dout
    dnormed = column_vjp(linear, n, whole, dqkv, sums)
    return norm_vjp(half.norm, x, normed, dnormed, sums).add_(dy), sums


def _split(items: list[Tensor], counts: tuple[int, ...]) -> Iterator[list[Tensor]]:
    at = 0
    for count in counts:
        yield items[at : at + count]
        at += count


def norm_vjp(norm: nn.Module, x: Tensor, normed: Tensor, dnormed: Tensor, sums: Gradients) -> Tensor:
    """Gradient of x, whose norm is `normed` with its graph; adds the norm's own gradients to `sums`."""
    weights = [p for p in norm.parameters() if p.requires_grad]
    dx, *dweights = torch.autograd.grad(normed, (x, *weights), dnormed)
    for weight, gradient in zip(weights, dweights, strict=True):
        sums.add(weight, gradient)
    return dx


__all__ = ["AttentionHalf", "Cut", "Rebuild", "norm_vjp"]
