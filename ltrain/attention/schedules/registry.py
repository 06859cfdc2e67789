"""The schedules by name, and how each is put together from its parts.

`build` checks that a schedule can serve the problem and returns a function that makes it. Checks communicate
nothing; making a schedule may create communicators, which every rank of the group does in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

from ltrain.attention.schedules.all_gather import AllGather
from ltrain.attention.schedules.base import Exchange, Problem
from ltrain.attention.schedules.engine import Schedule, TokenSharded
from ltrain.attention.schedules.halo import halo_blocks
from ltrain.attention.schedules.hierarchical import Hierarchical
from ltrain.attention.schedules.needed import Needed, NeededBlocks, needed_blocks
from ltrain.attention.schedules.nested_ring import NestedRing
from ltrain.attention.schedules.nodes import Nodes
from ltrain.attention.schedules.ring import Ring
from ltrain.attention.schedules.ulysses import HeadExchange, HeadSharded, deal_heads, local_problem
from ltrain.attention.schedules.verticals import WithVerticals
from ltrain.config.base import ConfigError
from ltrain.parallel.collectives import Channel, Group, channel, rank_in

Maker = Callable[[], Schedule]


def build(name: str, problem: Problem, group: Group, node_size: int | None) -> Maker:
    """A function that makes the schedule `name` for this rank. Raises ConfigError where it can't serve the
    problem."""
    if name not in SCHEDULES:
        raise ConfigError("schedule", name, f"must be one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](problem, group, node_size)


def _tokens(problem: Problem, group: Group, exchange: Exchange) -> Schedule:
    """The exchange with the pattern's verticals, if it has any."""
    if problem.verticals is not None:
        chunks = [problem.chunk([rank])[0] for rank in range(problem.layout.world_size)]
        kv, grad = channel(group, "verticals"), channel(group, "grad of verticals")
        exchange = WithVerticals(exchange, problem, chunks, kv, grad)
    return TokenSharded(exchange)


def _ring(problem: Problem, group: Group, node_size: int | None) -> Maker:
    def make() -> Schedule:
        chunks = [problem.chunk([rank])[0] for rank in range(problem.layout.world_size)]
        me = rank_in(group)
        return _tokens(
            problem, group, Ring(problem, chunks, chunks[me], channel(group, "kv"), channel(group, "grad"))
        )

    return make


def _all_gather(problem: Problem, group: Group, node_size: int | None) -> Maker:
    def make() -> Schedule:
        whole, order = problem.chunk(range(problem.layout.world_size))
        queries, _ = problem.chunk([rank_in(group)])
        return _tokens(
            problem,
            group,
            AllGather(problem, whole, order, queries, channel(group, "kv"), channel(group, "grad")),
        )

    return make


def _ulysses(problem: Problem, group: Group, node_size: int | None) -> Maker:
    size = problem.layout.world_size

    def make() -> Schedule:
        me = rank_in(group)
        alone = Channel(None, (me,), 0)
        return _head_sharded(problem, Nodes(size, size), channel(group, "heads"), alone, alone)

    return make


def _hierarchical(problem: Problem, group: Group, node_size: int | None) -> Maker:
    nodes = Nodes.of(problem.layout.world_size, node_size, "hierarchical")

    def make() -> Schedule:
        queries, _ = problem.chunk([rank_in(group)])
        kv, grad = nodes.channels(group, "kv"), nodes.channels(group, "grad")
        return _tokens(problem, group, Hierarchical(problem, nodes, queries, kv, grad))

    return make


def _nested_ring(problem: Problem, group: Group, node_size: int | None) -> Maker:
    nodes = Nodes.of(problem.layout.world_size, node_size, "nested_ring")

    def make() -> Schedule:
        chunks = [problem.chunk([rank])[0] for rank in range(nodes.world_size)]
        kv, grad = nodes.channels(group, "kv"), nodes.channels(group, "grad")
        return _tokens(problem, group, NestedRing(problem, nodes, chunks[rank_in(group)], chunks, kv, grad))

    return make


def _ulysses_ring(problem: Problem, group: Group, node_size: int | None) -> Maker:
    nodes = Nodes.of(problem.layout.world_size, node_size, "ulysses_ring")

    def make() -> Schedule:
        node, lane = nodes.place(rank_in(group))
        heads = channel(group, "heads", nodes.members(node))
        kv, grad = (channel(group, f"{purpose} across", nodes.column(lane)) for purpose in ("kv", "grad"))
        return _head_sharded(problem, nodes, heads, kv, grad)

    return make


def _needed(problem: Problem, group: Group, node_size: int | None) -> Maker:
    blocks = needed_blocks(problem)
    return lambda: _of_blocks(problem, group, blocks, pairwise=False)


def _halo(problem: Problem, group: Group, node_size: int | None) -> Maker:
    blocks = halo_blocks(problem)
    return lambda: _of_blocks(problem, group, blocks, pairwise=True)


def _of_blocks(problem: Problem, group: Group, blocks: NeededBlocks, pairwise: bool) -> Schedule:
    queries, _ = problem.chunk([rank_in(group)])
    kv, grad = channel(group, "kv"), channel(group, "grad")
    return _tokens(problem, group, Needed(problem, queries, kv, grad, blocks, pairwise))


def _head_sharded(
    problem: Problem, nodes: Nodes, heads_channel: Channel, kv: Channel, grad: Channel
) -> Schedule:
    """Heads dealt inside a node, keys and values of whole nodes in a ring across nodes."""
    lengths = problem.layout.lengths
    chunks = [problem.chunk(nodes.members(node)) for node in range(nodes.count)]
    chunk, order = chunks[kv.me]
    deal = deal_heads(problem.num_q_heads, problem.num_kv_heads, nodes.lanes, problem.head_work())
    heads = HeadExchange(
        heads_channel,
        [lengths[rank] for rank in nodes.members(kv.me)],
        [rank % nodes.lanes for rank in order],
        deal,
    )
    mine = local_problem(problem, deal, heads.me)
    tokens = [c for c, _ in chunks]
    inner: Exchange = Ring(mine, tokens, chunk, kv, grad)
    if mine.verticals is not None and mine.num_q_heads:
        inner = WithVerticals(inner, mine, tokens, kv, grad)
    return HeadSharded(heads, inner)


SCHEDULES: dict[str, Callable[[Problem, Group, int | None], Maker]] = {
    "ring": _ring,
    "all_gather": _all_gather,
    "ulysses": _ulysses,
    "hierarchical": _hierarchical,
    "nested_ring": _nested_ring,
    "ulysses_ring": _ulysses_ring,
    "halo": _halo,
    "needed": _needed,
}
