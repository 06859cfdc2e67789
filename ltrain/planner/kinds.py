"""The kinds of group that a cluster offers, and where groups of given kinds can stand.

Devices of one island are interchangeable, so a plan only has to decide how many groups of each kind there
are; ranks follow by placement: a group that fits a node never crosses nodes, a larger one takes whole nodes
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ltrain.config.base import ConfigError
from ltrain.planner.cluster import ClusterSpec, Island


@dataclass(frozen=True)
class GroupKind:
    """A group shape: `use[i]` devices of island i.

    `weights[i]` is the share of a sequence that each device of island i holds (they sum to 1 over the group),
    `capacity` the tokens that the group holds under these weights, `compute_scale` the time of one unit of
    work under them.
    """

    degree: int
    use: tuple[int, ...]
    weights: tuple[float, ...]
    capacity: int
    compute_scale: float
    num_nodes: int
    per_node: int
    intra_gb_s: float
    inter_gb_s: float
    latency_s: float
    measured_gb_s: float | None = None

    @property
    def even(self) -> bool:
        """All members hold equal shards."""
        return len({weight for weight, count in zip(self.weights, self.use, strict=True) if count}) == 1

    @property
    def max_weight(self) -> float:
        return max(weight for weight, count in zip(self.weights, self.use, strict=True) if count)

    def name(self) -> str:
        return f"{self.degree}" if sum(1 for count in self.use if count) == 1 else f"{self.degree} mixed"


def degrees_up_to(limit: int, degrees: str | Sequence[int]) -> list[int]:
    """Allowed degrees, descending: 'powers_of_two', 'any', or a list of positive ints."""
    if degrees == "powers_of_two":
        return [1 << power for power in reversed(range(limit.bit_length())) if 1 << power <= limit]
    if degrees == "any":
        return list(range(limit, 0, -1))
    if isinstance(degrees, str) or not degrees or any(int(degree) < 1 for degree in degrees):
        raise ConfigError("degrees", degrees, "must be powers_of_two, any, or a list of positive degrees")
    return sorted({int(degree) for degree in degrees if int(degree) <= limit}, reverse=True)


def group_kinds(
    cluster: ClusterSpec, tokens_of_island: Sequence[int], degrees: str | Sequence[int], block: int = 1
) -> list[GroupKind]:
    """All kinds, largest degree first.

    Inside an island every allowed degree; across islands the union of neighbouring islands and, for even
    degrees, halves of two neighbours. A mixed kind comes with shards by speed, by memory, and even, where
    these differ. Capacity counts whole blocks of `block` tokens, so that a shard rounded up to blocks still
    fits.
    """
    islands = cluster.islands
    uses: list[tuple[int, ...]] = []
    for index, island in enumerate(islands):
        for degree in degrees_up_to(island.size, degrees):
            uses.append(tuple(degree if other == index else 0 for other in range(len(islands))))
    allowed = set(degrees_up_to(cluster.num_devices, degrees))
    for first in range(len(islands)):
        for last in range(first + 1, len(islands)):
            union = tuple(island.size if first <= i <= last else 0 for i, island in enumerate(islands))
            if sum(union) in allowed or (
                first == 0 and last == len(islands) - 1 and degrees == "powers_of_two"
            ):
                uses.append(union)
        if first + 1 < len(islands):
            for half in degrees_up_to(min(islands[first].size, islands[first + 1].size), degrees):
                pair = tuple(half if i in (first, first + 1) else 0 for i in range(len(islands)))
                if 2 * half in allowed and pair not in uses:
                    uses.append(pair)
    caps = [tokens // block * block for tokens in tokens_of_island]
    kinds = [kind for use in uses for kind in _variants(cluster, use, caps, block)]
    kinds = [kind for kind in kinds if kind.capacity > 0]
    return sorted(kinds, key=lambda kind: (-kind.degree, kind.use, kind.compute_scale))


def _variants(cluster: ClusterSpec, use: tuple[int, ...], caps: Sequence[int], block: int) -> list[GroupKind]:
    members = [i for i, count in enumerate(use) if count]
    islands = cluster.islands
    degree = sum(use)
    speed = {i: islands[i].node.speed for i in members}
    rules = [dict.fromkeys(members, 1.0)]
    if len(members) > 1:
        rules += [speed, {i: float(caps[i]) for i in members}]
    kinds: list[GroupKind] = []
    for rule in rules:
        total = sum(rule[i] * use[i] for i in members)
        if total <= 0 or min(rule.values()) <= 0:
            continue
        weights = tuple(rule[i] / total if i in rule else 0.0 for i in range(len(use)))
        capacity = min(int(caps[i] / weights[i] + 1e-6) for i in members) // block * block
        scale = max(weights[i] / speed[i] for i in members)
        links = _links(islands, use, members)
        rate = cluster.all_to_all_gb_s.get(degree) if len(members) == 1 else None
        kind = GroupKind(degree, use, weights, capacity, scale, *links, rate)
        if not any(other.capacity >= capacity and other.compute_scale <= scale for other in kinds):
            kinds.append(kind)
    return kinds


def _links(
    islands: Sequence[Island], use: tuple[int, ...], members: Sequence[int]
) -> tuple[int, int, float, float, float]:
    nodes = sum(-(-use[i] // islands[i].node.num_devices) for i in members)
    per_node = min(max(use[i] for i in members), max(islands[i].node.num_devices for i in members))
    links = [islands[i].node.intra for i in members]
    inters = [link for i in members if (link := islands[i].node.inter) is not None]
    inter = min((link.gb_s for link in inters), default=float("inf"))
    latency = max([link.latency_s for link in (inters if nodes > 1 else links)], default=0.0)
    return nodes, per_node, min(link.gb_s for link in links), inter, latency


def place(
    cluster: ClusterSpec, kinds: Sequence[GroupKind], counts: Sequence[int]
) -> list[list[tuple[int, ...]]] | None:
    """Ranks for `counts[k]` groups of every kind, or None where nodes can't be filled so.

    Groups are placed by descending degree. Inside an island a group that fits a node goes to the fullest node
    that still holds it; a larger one takes whole free nodes and its remainder like a small group.
    """
    free = [_nodes(island) for island in cluster.islands]
    placed: list[list[tuple[int, ...]]] = [[] for _ in kinds]
    for index in sorted(range(len(kinds)), key=lambda k: (-kinds[k].degree, k)):
        for _ in range(counts[index]):
            ranks: list[int] = []
            for island, need in enumerate(kinds[index].use):
                taken = _take(free[island], need, cluster.islands[island].node.num_devices) if need else []
                if taken is None:
                    return None
                ranks += taken
            placed[index].append(tuple(sorted(ranks)))
    return placed


def _nodes(island: Island) -> list[list[int]]:
    size = island.node.num_devices
    return [
        list(range(island.first_rank + n * size, island.first_rank + (n + 1) * size))
        for n in range(island.num_nodes)
    ]


def _take(nodes: list[list[int]], need: int, size: int) -> list[int] | None:
    taken: list[int] = []
    while need >= size:
        whole = next((node for node in nodes if len(node) == size), None)
        if whole is None:
            return None
        taken += whole
        whole.clear()
        need -= size
    if need:
        fitting = [node for node in nodes if len(node) >= need]
        if not fitting:
            return None
        node = min(fitting, key=len)
        taken += node[:need]
        del node[:need]
    return taken
