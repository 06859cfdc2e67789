"""Finding a pattern's index on the ranks that share a sequence: the same index on any number of ranks.

The search is the pattern's own (`Pattern.steps`); here its requests are answered by collectives on one
group. Only watched queries, pooled keys, sums and choices travel, never keys as such; rows and heads are
finished by the rank that holds or was dealt them, and every rank builds its index from the same gathered
bits.
"""

from __future__ import annotations

from typing import Any, Unpack, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltrain.attention.patterns.base import LayerArguments, Pattern, Selection, Shape, check_queries
from ltrain.attention.patterns.exchange import Deal, Gather, Place, Request, Steps
from ltrain.config.base import ConfigError
from ltrain.parallel.collectives import Group, Traffic, rank_in, size_of, timed
from ltrain.parallel.layout import SequenceLayout


@torch.no_grad()
def select_distributed(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    *,
    layout: SequenceLayout,
    group: Group,
    module: nn.Module | None = None,
    traffic: Traffic | None = None,
    **where: Unpack[LayerArguments],
) -> Selection:
    """The pattern's selection over the whole sequence in document order, equal on all ranks and to one
    process's.

    q [B, T_local, Hq, D] and k [B, T_local, Hkv, D] after rotary embedding: the tokens
    `layout.positions(rank)`, rank counted in `group`. doc_ids: int [T] or [B, T], the whole sequence.
    traffic: a counter to fill. Static patterns and dense layers communicate nothing. `.as_index()` of the
    result is a BlockIndex for `context_parallel_attention`. Raises ConfigError on shapes that do not fit the
    layout.
    """
    world_size, rank = size_of(group), rank_in(group)
    if world_size != layout.world_size:
        raise ConfigError("layout.world_size", layout.world_size, f"must be the group's {world_size}")
    if q.dim() != 4 or k.dim() != 4:
        raise ConfigError("q, k", (tuple(q.shape), tuple(k.shape)), "must be [B, T_local, H, D]")
    shape = _shape_of_group(pattern, q, k, layout, where)
    if pattern.static or pattern.is_dense_layer(shape.layer, shape.num_layers):
        return Selection(pattern.static_index(shape))
    check_queries(pattern.kind, q, k, shape, layout.length(rank))
    place = Place(rank, world_size, layout.block_owner, layout.block)
    return run_on_group(pattern.steps(q, k, shape, place, module), group, world_size, rank, traffic)


@torch.no_grad()
def lesson_distributed(
    pattern: Pattern,
    q: Tensor,
    k: Tensor,
    *,
    step: int,
    layout: SequenceLayout,
    group: Group,
    traffic: Traffic | None = None,
    **where: Unpack[LayerArguments],
) -> Any:
    """What `pattern.loss` compares the pattern's module with at training step `step`, equal on all ranks of
    the group; None for patterns without a loss of their own. Arguments as `select_distributed`.
    """
    world_size, rank = size_of(group), rank_in(group)
    shape = _shape_of_group(pattern, q, k, layout, where)
    place = Place(rank, world_size, layout.block_owner, layout.block)
    steps = pattern.lesson(q, k, shape, place, step)
    return None if steps is None else run_on_group(steps, group, world_size, rank, traffic)


def _shape_of_group(
    pattern: Pattern, q: Tensor, k: Tensor, layout: SequenceLayout, where: LayerArguments
) -> Shape:
    """The whole sequence's shape, from this rank's shards."""
    return pattern.shape_of(
        num_tokens=layout.num_tokens, num_kv_heads=k.shape[2], num_heads=q.shape[2], block=layout.block,
        device=q.device, **where,
    )  # fmt: skip


def run_on_group(
    steps: Steps, group: Group, world_size: int, rank: int, traffic: Traffic | None = None
) -> Any:
    """Drive a search whose requests are answered by collectives on `group`; one collective a request."""
    try:
        request = next(steps)
        while True:
            request = steps.send(_answer(request, group, world_size, rank, traffic))
    except StopIteration as stop:
        return stop.value


def _answer(request: Request, group: Group, world_size: int, rank: int, traffic: Traffic | None) -> Tensor:
    if world_size == 1:
        return request.rows
    if isinstance(request, Gather):
        return _gather(request, group, world_size, rank, traffic)
    return _deal(request, group, world_size, rank, traffic)


def _gather(request: Gather, group: Group, world_size: int, rank: int, traffic: Traffic | None) -> Tensor:
    """All-gather of rows, padded to the longest rank, put in the order of `owner`."""
    counts = np.bincount(request.owner, minlength=world_size)
    longest = int(counts.max()) if len(request.owner) else 0
    rows = request.rows
    if longest == 0 or rows.shape[1:].numel() == 0:
        return rows.new_empty(len(request.owner), *rows.shape[1:])
    sent = rows.new_zeros(longest, *rows.shape[1:])
    sent[: len(rows)] = rows
    received = rows.new_empty(world_size, longest, *rows.shape[1:])
    # Bits are sent as bytes where the backend has no such type.
    _count(traffic, rank, [sent.numel() * sent.element_size()] * world_size)
    with timed(traffic, "wait", (sent,)):
        dist.all_gather_into_tensor(_plain(received.flatten(0, 1)), _plain(sent), group=group)
    slot = torch.from_numpy(request.owner * longest + _place_in_rank(request.owner, world_size)).to(
        rows.device
    )
    return received.flatten(0, 1).index_select(0, slot)


def _deal(request: Deal, group: Group, world_size: int, rank: int, traffic: Traffic | None) -> Tensor:
    """All-to-all: items [items, own rows, ...] to the ranks they are dealt to, their rows in the order of
    `owner`.
    """
    rows, dealt = request.rows, request.dealt
    counts = np.bincount(request.owner, minlength=world_size)
    items = np.bincount(dealt, minlength=world_size)
    width = int(np.prod(rows.shape[2:]))
    order = torch.from_numpy(np.argsort(dealt, kind="stable")).to(rows.device)
    send = rows.index_select(0, order).reshape(-1)
    sizes_out = [int(n) * rows.shape[1] * width for n in items]
    sizes_in = [int(items[rank]) * int(n) * width for n in counts]
    received = send.new_empty(sum(sizes_in))
    _count(traffic, rank, [size * send.element_size() for size in sizes_out])
    with timed(traffic, "wait", (send,)):
        dist.all_to_all_single(received, send, sizes_in, sizes_out, group=group)
    parts = [
        part.view(int(items[rank]), int(n), *rows.shape[2:])
        for part, n in zip(received.split(sizes_in), counts, strict=True)
    ]
    start = np.append(0, np.cumsum(counts)[:-1])
    slot = torch.from_numpy(start[request.owner] + _place_in_rank(request.owner, world_size)).to(rows.device)
    return torch.cat(parts, dim=1).index_select(1, slot)


def _count(traffic: Traffic | None, rank: int, sizes: list[int]) -> None:
    if traffic is not None:
        for peer, size in enumerate(sizes):
            traffic.add(rank, peer, size)


def _place_in_rank(owner: np.ndarray, world_size: int) -> np.ndarray:
    """How many earlier rows have the same owner, int64."""
    place = np.empty(len(owner), np.int64)
    for rank in range(world_size):
        mine = owner == rank
        place[mine] = np.arange(int(mine.sum()))
    return place


def _plain(x: Tensor) -> Tensor:
    return cast(Tensor, x.view(torch.uint8)) if x.dtype == torch.bool else x
