"""What one rank has to do for a plan: pure arithmetic, for the trainer to carry out.

The sequences of a group are packed, in order, into one stream. The stream is dealt to the members in blocks:
round robin where all shares are equal (the striped layout), in proportion where they are not (the dealt
layout).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.plan import Group, Plan


@dataclass(frozen=True)
class RankTask:
    """One micro-batch of one rank. An idle rank has no group and no sequences, and still takes part in
    collectives that span the world."""

    group: tuple[int, ...] | None
    member: int
    sequences: tuple[int, ...]
    num_tokens: int
    shard_lengths: tuple[int, ...]
    schedule: str
    weights: tuple[float, ...]

    @property
    def even(self) -> bool:
        """All members have equal shares."""
        return len(set(self.weights)) <= 1

    @property
    def is_idle(self) -> bool:
        return self.group is None


IDLE = RankTask(None, 0, (), 0, (), "local", ())


def rank_tasks(plan: Plan, rank: int, block: int = 128) -> tuple[RankTask, ...]:
    """The rank's task in every micro-batch, in order; the same number of tasks for every rank.

    Raises ValueError on a rank outside the plan.
    """
    if not 0 <= rank < plan.num_devices:
        raise ValueError(f"rank={rank} must be in 0..{plan.num_devices - 1}")
    tasks = []
    for groups in plan.micro_batches:
        own = next((group for group in groups if rank in group.ranks), None)
        tasks.append(IDLE if own is None else group_task(own, rank, block))
    return tuple(tasks)


def group_task(group: Group, rank: int, block: int = 128) -> RankTask:
    """The task of one member of a group."""
    owners = block_owners(group.num_tokens, group.weights, block)
    return RankTask(
        group.ranks,
        group.ranks.index(rank),
        group.sequences,
        group.num_tokens,
        shard_lengths(owners, group.num_tokens, group.degree, block),
        group.schedule,
        group.weights,
    )


def all_groups(plans: Sequence[Plan]) -> tuple[tuple[int, ...], ...]:
    """Every distinct set of two or more ranks that the plans use, in one order that all ranks agree on."""
    ranks = {
        group.ranks for plan in plans for groups in plan.micro_batches for group in groups if group.degree > 1
    }
    return tuple(sorted(ranks, key=lambda members: (-len(members), members)))


def ranks_per_node(cluster: ClusterSpec, ranks: Sequence[int]) -> int | None:
    """Members on each node of a group that spans several nodes equally, node after node; else None."""
    node_of = np.repeat(np.arange(len(cluster.nodes)), [node.num_devices for node in cluster.nodes])
    counts = Counter(int(node_of[rank]) for rank in sorted(ranks)).values()
    even = len(counts) > 1 and len(set(counts)) == 1
    return next(iter(counts)) if even else None


def block_owners(num_tokens: int, weights: Sequence[float], block: int) -> np.ndarray:
    """Member that holds each block of a stream, int64 [ceil(num_tokens / block)].

    Among the members whose share of the blocks so far is not full, the one that must have its next block
    first (a proportionate schedule): every member has its share of every prefix, to within one block, and
    equal weights give round robin. The fastest member so never gets more than its share rounded up.
    """
    num_blocks = -(-num_tokens // block)
    if len(set(weights)) == 1:
        return np.arange(num_blocks, dtype=np.int64) % len(weights)
    share = np.asarray(weights, dtype=np.float64)
    dealt = np.zeros(len(share))
    owners = np.empty(num_blocks, dtype=np.int64)
    for i in range(num_blocks):
        due = np.where(share * (i + 1) - dealt > 1e-9, (dealt + 1) / share, np.inf)
        owners[i] = int(due.argmin())
        dealt[owners[i]] += 1
    return owners


def shard_lengths(owners: np.ndarray, num_tokens: int, num_members: int, block: int) -> tuple[int, ...]:
    """Tokens that each member holds; the last block may be short."""
    lengths = np.bincount(owners, minlength=num_members) * block
    if len(owners):
        lengths[owners[-1]] -= len(owners) * block - num_tokens
    return tuple(int(length) for length in lengths)
