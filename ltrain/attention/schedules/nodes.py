"""How the ranks of a group lie on nodes, and the channels inside a node and across nodes."""

from __future__ import annotations

from dataclasses import dataclass

from ltrain.config.base import ConfigError
from ltrain.parallel.collectives import Channel, Group, channel, rank_in


@dataclass(frozen=True)
class Nodes:
    """Rank r is lane r mod `lanes` of node r div `lanes`.

    Raises ConfigError where the lanes of a node don't divide the ranks.
    """

    world_size: int
    lanes: int

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.world_size % self.lanes:
            fits = [n for n in range(1, self.world_size + 1) if self.world_size % n == 0]
            raise ConfigError(
                "node_size",
                self.lanes,
                f"must divide the group's {self.world_size} ranks for this schedule",
                f"use one of {fits}, or a schedule without nodes",
            )

    @classmethod
    def of(cls, world_size: int, node_size: int | None, schedule: str) -> Nodes:
        if node_size is None:
            raise ConfigError("node_size", None, f"must be given for schedule {schedule!r}")
        return cls(world_size, node_size)

    @property
    def count(self) -> int:
        return self.world_size // self.lanes

    def members(self, node: int) -> list[int]:
        return list(range(node * self.lanes, (node + 1) * self.lanes))

    def column(self, lane: int) -> list[int]:
        return list(range(lane, self.world_size, self.lanes))

    def place(self, rank: int) -> tuple[int, int]:
        """(node, lane) of a rank."""
        return rank // self.lanes, rank % self.lanes

    def channels(self, group: Group, purpose: str) -> tuple[Channel, Channel]:
        """(in the node, across nodes on this rank's lane), each a communicator of its own."""
        node, lane = self.place(rank_in(group))
        return (
            channel(group, f"{purpose} node", self.members(node)),
            channel(group, f"{purpose} across", self.column(lane)),
        )
