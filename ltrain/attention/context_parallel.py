"""Attention over a sequence that a group of ranks shares: any block index, any layout, exact gradients.

`context_parallel_attention` is the one entry. It plans once for an index, layout, documents and shapes
(layers and micro-batches that share them share the plan), has all ranks compare what they are about to do,
and runs the plan.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ltrain.attention.choose import choose
from ltrain.attention.profile import Profile, default_profile
from ltrain.attention.schedules.base import Problem
from ltrain.attention.schedules.engine import Schedule
from ltrain.attention.schedules.registry import SCHEDULES, build
from ltrain.attention.schedules.verticals import Tiles
from ltrain.config.base import ConfigError
from ltrain.parallel.agreement import agree
from ltrain.parallel.collectives import Group, Traffic, rank_in, size_of, timed
from ltrain.parallel.layout import SequenceLayout
from ltrain_kernels.block_sparse import BlockIndex, ClosedIndex, ListIndex


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    group: Group,
    index: BlockIndex,
    doc_ids: Tensor | None = None,
    window: int | None = None,
    verticals: Tiles | None = None,
    token_ids: Tensor | None = None,
    schedule: str = "auto",
    scale: float | None = None,
    node_size: int | None = None,
    profile: Profile | None = None,
    grad_wire: torch.dtype | None = None,
    traffic: Traffic | None = None,
    saved: tuple[Tensor, Tensor] | None = None,
    plan: Schedule | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the whole sequence's keys and values, as `index` selects them.

    q [B, T_local, Hq, D], k [B, T_local, Hkv, D], v [B, T_local, Hkv, Dv]: the tokens
    `layout.positions(rank)`, rank counted in `group`. Hkv divides Hq; heads are numbered as in `index`.
    index: blocks of `layout.block` tokens over the whole sequence in document order, equal on all ranks;
    causality is by token id. doc_ids: int [T] or [B, T] for the whole sequence; tokens attend within their
    document only. window: a query sees keys less than so many tokens before it (None: no limit).
    token_ids: int [T], ascending: what causality and windows go by in the place of 0..T-1, for a sequence
    that was taken from a longer one. verticals: single keys that each head attends beside its blocks, in
    tiles (`patterns.Verticals.tiles`).
    schedule: a name of `SCHEDULES`, or "auto": what the cost model finds fastest with `profile` (default: a
    built-in one of the device), chosen at the first call with these shapes and printed with the reason by
    rank 0. node_size: so many consecutive ranks of the group share a node; needed by the schedules that use
    it. scale: default 1 / sqrt(D). grad_wire: the type in which partial dK and dV travel to their owner, who
    sums them in fp32; default the type of k. traffic: a counter to fill. saved: (out, lse) of an earlier call
    with equal inputs: they are returned as they are, without an exchange and without attention, and the
    gradients are those of the call. This is how activation checkpointing recomputes a layer; hand it the
    first call's plan as well. plan: what `plan_attention` returned for equal arguments; nothing is planned or
    compared.

    Returns out [B, T_local, Hq, Dv] in q's type and lse [B, Hq, T_local] fp32 (fp64 for fp64 inputs), natural
    log, both differentiable; a query that sees no key gets 0 and -inf.
    Deterministic. Raises ConfigError, on all ranks before the first exchange, where shapes don't fit the
    layout or differ between ranks, or where the schedule can't serve the index (arXiv 2510.18830;
    docs/context_parallel.md).
    """
    if plan is None:
        plan = plan_attention(
            q,
            k,
            v,
            layout=layout,
            group=group,
            index=index,
            doc_ids=doc_ids,
            window=window,
            verticals=verticals,
            token_ids=token_ids,
            schedule=schedule,
            node_size=node_size,
            profile=profile,
        )
    if traffic is not None and traffic.node_size is None:
        traffic.node_size = node_size
    call = _Call(
        plan, 1 / math.sqrt(q.shape[3]) if scale is None else scale, grad_wire or k.dtype, traffic, saved
    )
    return _Attention.apply(q, k, v, call)


@dataclass
class _Call:
    schedule: Schedule
    scale: float
    wire: torch.dtype
    traffic: Traffic | None
    saved: tuple[Tensor, Tensor] | None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        kept: tuple[Tensor, ...] = ()
        if call.saved is not None:
            out, lse = (x.detach() for x in call.saved)
        else:
            with timed(call.traffic, "attention", (q,)):
                out, lse, kept = call.schedule.forward(q, k, v, call.scale, call.traffic)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *kept = ctx.saved_tensors
        call = ctx.call
        # Every rank takes part in the exchange, also one whose output no loss depends on.
        dout = torch.zeros_like(out) if dout is None else dout
        with timed(call.traffic, "attention", (q,)):
            grads = call.schedule.backward(
                dout, q, k, v, out, lse, dlse, tuple(kept), call.scale, call.wire, call.traffic
            )
        return *grads, None


_MAX_PLANS = 8
_plans: OrderedDict[tuple[Any, ...], tuple[tuple[Any, ...], Schedule]] = OrderedDict()


def plan_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    group: Group,
    index: BlockIndex,
    doc_ids: Tensor | None = None,
    window: int | None = None,
    verticals: Tiles | None = None,
    token_ids: Tensor | None = None,
    schedule: str = "auto",
    node_size: int | None = None,
    profile: Profile | None = None,
) -> Schedule:
    """The plan of a call, from the cache where one was made for the same index, documents, layout and shapes.

    The cache goes by the identity of the index and document tensors: keep one index object for all layers
    that share a static pattern. Raises as `context_parallel_attention`.
    """
    shapes = (tuple(q.shape), tuple(k.shape), tuple(v.shape), q.dtype, k.dtype, v.dtype, str(q.device))
    parts = (index, doc_ids, group, verticals, token_ids)
    key = (
        *(id(x) for x in parts),
        getattr(doc_ids, "_version", 0),
        layout,
        window,
        schedule,
        node_size,
        shapes,
    )
    if key in _plans:
        refs, plan = _plans[key]
        if all((ref() if ref is not None else None) is x for ref, x in zip(refs, parts, strict=True)):
            _plans.move_to_end(key)
            return plan
        del _plans[key]
    plan = _make_plan(
        q, k, v, layout, group, index, doc_ids, window, verticals, token_ids, schedule, node_size, profile
    )
    _plans[key] = (tuple(None if x is None else weakref.ref(x) for x in parts), plan)
    dead = [
        old for old, (refs, _) in _plans.items() if any(ref is not None and ref() is None for ref in refs)
    ]
    for old in dead:
        del _plans[old]
    while len(_plans) > _MAX_PLANS:
        _plans.popitem(last=False)
    return plan


def _make_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    group: Group,
    index: BlockIndex,
    doc_ids: Tensor | None,
    window: int | None,
    verticals: Tiles | None,
    token_ids: Tensor | None,
    schedule: str,
    node_size: int | None,
    profile: Profile | None,
) -> Schedule:
    error: Exception | None = None
    make: Callable[[], Schedule] | None = None
    chosen, why = schedule, ""
    try:
        _check_shapes(q, k, v, layout, group, index, doc_ids, token_ids)
        problem = Problem(
            layout,
            index.to(q.device),
            doc_ids,
            q.shape[0],
            q.shape[2],
            k.shape[2],
            q.shape[3],
            v.shape[3],
            q.dtype,
            q.device,
            window,
            verticals,
            token_ids,
        )
        chosen, why = _choice(problem, schedule, profile, node_size)
        make = build(chosen, problem, group, node_size)
    except Exception as caught:
        error = caught
    facts = {
        "layout": layout,
        "schedule": chosen,
        "profile": profile,
        "window": window,
        "node_size": node_size,
        "q": (q.shape[0], *q.shape[2:], q.dtype),
        "k": (k.shape[0], *k.shape[2:], k.dtype),
        "v": (v.shape[0], *v.shape[2:], v.dtype),
        "doc_ids": _digest(doc_ids),
        "index": index_digest(index),
        "verticals": "none" if verticals is None else _digest(verticals.ids),
        "token_ids": _digest(token_ids),
    }
    agree(group, facts, error, q.device)
    assert make is not None
    if why and rank_in(group) == 0:
        print(f"context parallelism: {why}", flush=True)
    return make()


_choices: dict[tuple[Any, ...], str] = {}


def _choice(
    problem: Problem, schedule: str, profile: Profile | None, node_size: int | None
) -> tuple[str, str]:
    """The schedule to use, and the reason where it was chosen just now."""
    if schedule != "auto":
        if profile is not None:
            profile.check_machine(problem.device)
        return schedule, ""
    if profile is None:
        profile = default_profile(problem.device, node_size)
    profile.check_machine(problem.device)
    if node_size is not None:
        profile = replace(profile, node_size=node_size)
    layout = problem.layout
    # Excerpts of a sequence change from layer to layer and dealt layouts with every batch; those of one size
    # share a choice.
    same = (layout.num_tokens, layout.world_size, layout.block)
    key = (
        layout if problem.token_ids is None and layout.kind != "dealt" else same,
        problem.batch,
        problem.num_q_heads,
        problem.num_kv_heads,
        problem.head_dim,
        problem.value_dim,
        problem.dtype,
        problem.window,
        problem.doc_ids is None,
        type(problem.index),
        problem.index.heads,
        profile,
        node_size,
    )
    if key in _choices:
        return _choices[key], ""
    limit = (
        torch.cuda.get_device_properties(problem.device).total_memory / 8
        if problem.device.type == "cuda"
        else None
    )
    name, why = choose(problem, profile, node_size, limit)
    if len(_choices) >= _MAX_PLANS:
        _choices.pop(next(iter(_choices)))
    _choices[key] = name
    return name, why


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    group: Group,
    index: BlockIndex,
    doc_ids: Tensor | None,
    token_ids: Tensor | None,
) -> None:
    def check(holds: bool, field: str, value: object, rule: str, fix: str = "") -> None:
        if not holds:
            raise ConfigError(field, value, rule, fix)

    for name, x in (("q", q), ("k", k), ("v", v)):
        check(x.dim() == 4, f"{name}.shape", tuple(x.shape), "must be [batch, tokens, heads, head size]")
    size = size_of(group)
    check(
        layout.world_size == size, "layout.world_size", layout.world_size, f"must be the group's size {size}"
    )
    length = layout.length(rank_in(group))
    for name, x in (("q", q), ("k", k), ("v", v)):
        check(x.shape[1] == length, f"{name}.shape[1]", x.shape[1], f"must be this rank's {length} tokens")
        check(x.shape[0] == q.shape[0], f"{name}.shape[0]", x.shape[0], f"must be q's batch {q.shape[0]}")
        check(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"must be q's type {q.dtype}")
    check(k.shape[3] == q.shape[3], "k.shape[3]", k.shape[3], f"must be q's head size {q.shape[3]}")
    check(v.shape[2] == k.shape[2], "v.shape[2]", v.shape[2], f"must be k's {k.shape[2]} heads")
    heads = k.shape[2]
    check(
        heads > 0 and q.shape[2] % heads == 0,
        "k.shape[2]",
        heads,
        f"must divide the {q.shape[2]} query heads",
    )
    check(
        index.block_q == index.block_k == layout.block,
        "index.block",
        (index.block_q, index.block_k),
        f"must be layout.block={layout.block}",
    )
    blocks = (index.num_rows, index.num_cols)
    check(
        blocks == (layout.num_blocks, layout.num_blocks),
        "index.blocks",
        blocks,
        f"must be {layout.num_blocks} x {layout.num_blocks}, over the whole sequence",
    )
    check(
        index.heads in (1, heads, q.shape[2]),
        "index.heads",
        index.heads,
        f"must be 1, {heads} or {q.shape[2]}",
    )
    check(index.batch in (1, q.shape[0]), "index.batch", index.batch, f"must be 1 or {q.shape[0]}")
    if token_ids is not None:
        shape = tuple(token_ids.shape)
        check(shape == (layout.num_tokens,), "token_ids.shape", shape, f"must be [{layout.num_tokens}]")
    if doc_ids is not None:
        good = [(layout.num_tokens,), (1, layout.num_tokens), (q.shape[0], layout.num_tokens)]
        check(tuple(doc_ids.shape) in good, "doc_ids.shape", tuple(doc_ids.shape), f"must be one of {good}")


def _digest(x: Tensor | None) -> str:
    """Shape and a position-weighted sum of an integer tensor, computed where it lives."""
    if x is None:
        return "none"
    flat = x.detach().reshape(-1).to(torch.int64)
    weight = torch.arange(flat.numel(), device=flat.device) * 2654435761 % 2147483647 + 1
    return f"{tuple(x.shape)} {int((flat * weight).sum())}"


def index_digest(index: BlockIndex) -> str:
    """A short text that differs, but for a chance of 2^-60, between indices that select different blocks."""
    assert isinstance(index, ListIndex | ClosedIndex)
    parts = (index.row_ptr, index.col) if isinstance(index, ListIndex) else (index.params,)
    return " ".join([repr(index), *(_digest(x) for x in parts)])


__all__ = ["SCHEDULES", "context_parallel_attention", "index_digest", "plan_attention"]
