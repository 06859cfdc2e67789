"""Attention of a layer whose pattern has weights of its own: its branches, and its own loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ltrain.attention.context import AttentionContext
from ltrain.attention.context_parallel import context_parallel_attention, plan_attention
from ltrain.attention.gather_blocks import gather_blocks
from ltrain.attention.patterns import Pattern
from ltrain.attention.patterns.base import LayerCall
from ltrain.attention.patterns.exchange import Place
from ltrain.attention.schedules.engine import Schedule
from ltrain.attention.select import lesson_distributed
from ltrain.parallel.collectives import size_of, timed
from ltrain_kernels.block_sparse import BlockIndex, block_sparse_attention


def mark_heads(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in `dtype`, its parameters marked as tensor-parallel shards by their first dimension."""
    for parameter in module.to(dtype).parameters():
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = 0  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]
    return module


class Tape:
    """What a layer's branches computed by attention and fetched from other ranks, in the order of the calls.

    A new tape records. One that is made from the `saved` tensors and the `plans` of an earlier tape gives the
    same calls the same results: nothing is attended, planned or exchanged, and the gradients are theirs.
    """

    def __init__(self, saved: tuple[Tensor, ...] | None = None, plans: tuple[Schedule, ...] = ()) -> None:
        self.replays = saved is not None
        self._results = [] if saved is None else list(zip(saved[::2], saved[1::2], strict=True))
        self._plans, self._result, self._plan = list(plans), 0, 0

    @property
    def saved(self) -> tuple[Tensor, ...]:
        """Two tensors a call."""
        return tuple(x for pair in self._results for x in pair)

    @property
    def plans(self) -> tuple[Schedule, ...]:
        return tuple(self._plans)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: BlockIndex,
        *,
        shared: dict[str, Any],
        exchange: dict[str, Any],
        **options: Any,
    ) -> Tensor:
        """Attention over the sequence; arguments as `plan_attention` and `context_parallel_attention`."""
        if not self.replays:
            self._plans.append(plan_attention(q, k, v, index=index, **shared, **exchange))
        plan = self._plans[self._plan]
        self._plan += 1
        pair = context_parallel_attention(
            q, k, v, index=index, plan=plan, saved=self._earlier(), **shared, **options
        )
        return self._keep(*pair)[0]

    def attend_here(self, *args: Any, **where: Any) -> Tensor:
        """`block_sparse_attention`'s output."""
        return self._keep(*block_sparse_attention(*args, saved=self._earlier(), **where))[0]

    def gather(self, x: Tensor, y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """`gather_blocks`; a rank alone has everything and keeps nothing."""
        if size_of(options["group"]) == 1:
            return x, y
        return self._keep(*gather_blocks(x, y, saved=self._earlier(), **options))

    def _earlier(self) -> tuple[Tensor, Tensor] | None:
        if not self.replays:
            return None
        self._result += 1
        return self._results[self._result - 1]

    def _keep(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        if not self.replays:
            self._results.append((first.detach(), second.detach()))
        return first, second


def learned_branches(
    pattern: Pattern,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex,
    context: AttentionContext,
    tape: Tape,
    *,
    shared: dict[str, Any],
    exchange: dict[str, Any],
    scale: float | None,
) -> tuple[Tensor, ...]:
    """The pattern's branches of rotated q and k. `shared` are arguments of `context_parallel_attention`,
    `exchange` those of `plan_attention` besides.
    """
    layout = context.layout
    assert layout is not None
    group, traffic = context.group, context.traffic
    call = LayerCall(
        num_tokens=layout.num_tokens,
        doc_ids=context.doc_ids,
        place=Place(context.rank, layout.world_size, layout.block_owner, layout.block),
        attend=partial(tape.attend, shared=shared, exchange=exchange, scale=scale, traffic=traffic),
        gather=partial(tape.gather, layout=layout, group=group, traffic=traffic),
        attend_here=tape.attend_here,
        cached=context.cached,
        window=shared["window"],
        scale=scale,
    )
    return pattern.branches(module, q, k, v, index, call)


def own_loss(
    pattern: Pattern,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    context: AttentionContext,
    heads: dict[str, Any],
) -> tuple[Tensor, float] | None:
    """The pattern's own loss and the weight of its gradient in this rank's share of the step; None if it has
    none. q and k are rotated, `heads` are arguments of a search. The loss reaches the module alone.
    """
    with timed(context.traffic, "selection", (q,)):
        lesson = lesson_distributed(
            pattern, q.detach(), k.detach(), step=context.step, layout=context.layout, group=context.group,
            traffic=context.traffic, **heads,
        )  # fmt: skip
        if lesson is None:
            return None
        loss = pattern.loss(module, lesson)
    context.pattern_losses[heads["layer"]] = loss.detach()
    # The loss is a mean over this rank's heads, equal on all ranks of the group; the step's gradient is
    # summed over ranks and divided by its number of targets.
    return loss, context.num_targets * k.shape[2] / heads["total_kv_heads"]


def with_loss(out: Tensor, loss: Tensor, weight: float) -> Tensor:
    """`out` as it is; its backward also starts the backward of `loss`, with gradient `weight`."""
    return _WithLoss.apply(out, loss, weight)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.like = weight, loss.detach()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:
        return dout, torch.full_like(ctx.like, ctx.weight), None
