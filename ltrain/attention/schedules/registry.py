"""The schedules by name, and how each is put together from its parts.

`build` checks that a schedule can serve the problem and returns a function that makes it. Checks communicate
nothing; making a schedule may create communicators, which every rank of the group does in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

from ltrain.attention.schedules.all_gather import AllGather
from ltrain.attention.schedules.base import Problem
from ltrain.attention.schedules.engine import Schedule, TokenSharded
from ltrain.attention.schedules.ring import Ring
from ltrain.attention.schedules.ulysses import HeadExchange, HeadSharded, deal_heads, local_problem
from ltrain.config.base import ConfigError
from ltrain.parallel.collectives import Channel, Group, channel, rank_in

Maker = Callable[[], Schedule]


def build(name: str, problem: Problem, group: Group, node_size: int | None) -> Maker:
    """A function that makes the schedule `name` for this rank. Raises ConfigError where it can't serve the
    problem."""
    if name not in SCHEDULES:
        raise ConfigError("schedule", name, f"must be one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](problem, group, node_size)


def _ring(problem: Problem, group: Group, node_size: int | None) -> Maker:
    def make() -> Schedule:
        chunks = [problem.chunk([rank])[0] for rank in range(problem.layout.world_size)]
        me = rank_in(group)
        return TokenSharded(Ring(problem, chunks, chunks[me], channel(group, "kv"), channel(group, "grad")))

    return make


def _all_gather(problem: Problem, group: Group, node_size: int | None) -> Maker:
    def make() -> Schedule:
        whole, order = problem.chunk(range(problem.layout.world_size))
        queries, _ = problem.chunk([rank_in(group)])
        return TokenSharded(
            AllGather(problem, whole, order, queries, channel(group, "kv"), channel(group, "grad"))
        )

    return make


def _ulysses(problem: Problem, group: Group, node_size: int | None) -> Maker:
    def make() -> Schedule:
        deal = deal_heads(problem.num_q_heads, problem.num_kv_heads, problem.layout.world_size, None)
        whole, order = problem.chunk(range(problem.layout.world_size))
        heads = HeadExchange(channel(group, "heads"), list(problem.layout.lengths), order, deal)
        mine = local_problem(problem, deal, heads.me)
        alone = Channel(None, (heads.channel.ranks[heads.me],), 0)
        return HeadSharded(heads, Ring(mine, [whole], whole, alone, alone))

    return make


SCHEDULES: dict[str, Callable[[Problem, Group, int | None], Maker]] = {
    "auto": _ring,
    "ring": _ring,
    "all_gather": _all_gather,
    "ulysses": _ulysses,
}
