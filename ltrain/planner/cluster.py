"""What the planner knows about the machines: nodes of equal devices, and the links inside and between
nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ltrain.config.base import ConfigError


@dataclass(frozen=True)
class Link:
    """A link as one device sees it: `gb_s` is 10^9 bytes per second in one direction, `latency_s` per
    message."""

    gb_s: float
    latency_s: float = 0.0


@dataclass(frozen=True)
class Node:
    """`num_devices` equal devices behind one switch.

    `speed` is relative to the device that the cost model was measured on. Memory is either
    `tokens_per_device` or `memory_gib`, which the cost model's memory figures turn into tokens. `inter` may
    be absent on a one-node cluster. A device, to the planner, is whatever runs one shard of a sequence: with
    tensor or pipeline parallelism it is the whole block of devices that does.
    """

    num_devices: int
    intra: Link
    inter: Link | None = None
    kind: str = "device"
    speed: float = 1.0
    tokens_per_device: int | None = None
    memory_gib: float | None = None


@dataclass(frozen=True)
class Island:
    """Consecutive nodes that are equal in everything: the unit inside which devices are interchangeable."""

    node: Node
    num_nodes: int
    first_rank: int

    @property
    def size(self) -> int:
        return self.num_nodes * self.node.num_devices


@dataclass(frozen=True)
class ClusterSpec:
    """The devices in rank order, node after node.

    `all_to_all_gb_s` holds measured rates, bytes of one device's tensor per second, by group degree; a degree
    that is not in it is computed from the links. Raises ConfigError where a node, a link or a memory figure
    is missing or wrong.
    """

    nodes: tuple[Node, ...]
    all_to_all_gb_s: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ConfigError("cluster.nodes", 0, "must list at least one node", "add an entry under `nodes`")
        for index, node in enumerate(self.nodes):
            _check_node(f"cluster.nodes[{index}]", node, alone=len(self.nodes) == 1)
        for degree, rate in self.all_to_all_gb_s.items():
            if degree < 2 or rate <= 0:
                raise ConfigError(
                    f"cluster.all_to_all_gb_s[{degree}]",
                    rate,
                    "must be a positive rate of a degree of 2 or more",
                )

    @classmethod
    def uniform(
        cls,
        num_devices: int,
        devices_per_node: int,
        intra_gb_s: float,
        inter_gb_s: float,
        tokens_per_device: int,
        *,
        all_to_all_gb_s: Mapping[int, float] | None = None,
        latency_s: float = 0.0,
    ) -> ClusterSpec:
        """Equal devices; rates are per device. The last node may be partly filled."""
        if num_devices < 1:
            raise ConfigError("cluster.num_devices", num_devices, "must be at least 1")
        if devices_per_node < 1:
            raise ConfigError("cluster.devices_per_node", devices_per_node, "must be at least 1")
        sizes = [devices_per_node] * (num_devices // devices_per_node)
        if num_devices % devices_per_node:
            sizes.append(num_devices % devices_per_node)
        intra, inter = Link(intra_gb_s, latency_s), Link(inter_gb_s, latency_s)
        nodes = tuple(Node(size, intra, inter, tokens_per_device=tokens_per_device) for size in sizes)
        return cls(nodes, dict(all_to_all_gb_s or {}))

    @classmethod
    def from_file(cls, path: str | Path) -> ClusterSpec:
        """A cluster from a YAML or JSON profile (`docs/planner.md` shows one). Raises ConfigError on bad
        content."""
        try:
            data = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ConfigError(
                "cluster", str(path), f"can't be read ({error.strerror})", "give a profile file"
            ) from None
        except yaml.YAMLError as error:
            raise ConfigError("cluster", str(path), f"is not YAML ({error})") from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Any) -> ClusterSpec:
        """A cluster from the profile's mapping. Raises ConfigError naming the entry that is missing or
        wrong."""
        if not isinstance(data, dict) or not isinstance(data.get("nodes"), list):
            raise ConfigError(
                "cluster.nodes", None, "is missing from the profile", "list the nodes and their links"
            )
        _refuse_unknown("cluster", data, {"nodes", "all_to_all_gb_s"})
        nodes: list[Node] = []
        for index, entry in enumerate(data["nodes"]):
            nodes += _read_node(f"cluster.nodes[{index}]", entry)
        try:
            rates = {int(degree): float(rate) for degree, rate in (data.get("all_to_all_gb_s") or {}).items()}
        except (TypeError, ValueError, AttributeError):
            raise ConfigError(
                "cluster.all_to_all_gb_s", data["all_to_all_gb_s"], "must map degrees to GB/s"
            ) from None
        return cls(tuple(nodes), rates)

    def to_dict(self) -> dict[str, Any]:
        """The profile's mapping: `from_dict(to_dict())` is the same cluster."""
        nodes = []
        for node in self.nodes:
            entry = {key: value for key, value in asdict(node).items() if value is not None}
            entry["devices"] = entry.pop("num_devices")
            nodes.append(entry)
        return {"nodes": nodes, "all_to_all_gb_s": dict(self.all_to_all_gb_s)}

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON, which `from_file` reads."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @cached_property
    def num_devices(self) -> int:
        return sum(node.num_devices for node in self.nodes)

    @cached_property
    def islands(self) -> tuple[Island, ...]:
        """Runs of equal nodes, in rank order."""
        islands: list[Island] = []
        rank = 0
        for node in self.nodes:
            if islands and islands[-1].node == node:
                last = islands[-1]
                islands[-1] = Island(node, last.num_nodes + 1, last.first_rank)
            else:
                islands.append(Island(node, 1, rank))
            rank += node.num_devices
        return tuple(islands)

    def check_world(self, num_devices: int) -> None:
        """Raise ConfigError unless the cluster has exactly `num_devices` devices."""
        if num_devices != self.num_devices:
            raise ConfigError(
                "cluster.num_devices",
                self.num_devices,
                f"must be the {num_devices} shards of the run (world size over tensor x pipeline degree)",
                "give the profile of this machine, or launch on the machine of the profile",
            )


def _check_node(name: str, node: Node, alone: bool) -> None:
    if node.num_devices < 1:
        raise ConfigError(f"{name}.devices", node.num_devices, "must be at least 1")
    if not node.speed > 0:
        raise ConfigError(f"{name}.speed", node.speed, "must be positive")
    if (node.tokens_per_device is None) == (node.memory_gib is None):
        raise ConfigError(
            f"{name}.tokens_per_device", node.tokens_per_device, "or memory_gib must be given, and not both"
        )
    if node.tokens_per_device is not None and node.tokens_per_device < 1:
        raise ConfigError(f"{name}.tokens_per_device", node.tokens_per_device, "must be at least 1")
    if node.memory_gib is not None and not node.memory_gib > 0:
        raise ConfigError(f"{name}.memory_gib", node.memory_gib, "must be positive")
    if node.inter is None and not alone:
        raise ConfigError(
            f"{name}.inter", None, "is missing: the cluster has several nodes", "add gb_s and latency_s"
        )
    for field_name, link in (("intra", node.intra), ("inter", node.inter)):
        if link is not None and (not link.gb_s > 0 or link.latency_s < 0):
            raise ConfigError(
                f"{name}.{field_name}", link, "must have a positive gb_s and a latency_s of 0 or more"
            )


def _refuse_unknown(name: str, entry: dict[str, Any], known: set[str]) -> None:
    unknown = sorted(str(key) for key in set(entry) - known)
    if unknown:
        raise ConfigError(
            f"{name}.{unknown[0]}", entry[unknown[0]], "is not a field", f"use {', '.join(sorted(known))}"
        )


def _read_link(name: str, entry: Any) -> Link:
    if not isinstance(entry, dict) or "gb_s" not in entry:
        raise ConfigError(f"{name}.gb_s", entry, "is missing", "give the link's gb_s, and latency_s if known")
    _refuse_unknown(name, entry, {"gb_s", "latency_s"})
    try:
        return Link(float(entry["gb_s"]), float(entry.get("latency_s", 0.0)))
    except (TypeError, ValueError):
        raise ConfigError(name, entry, "must hold numbers") from None


def _read_node(name: str, entry: Any) -> list[Node]:
    if not isinstance(entry, dict):
        raise ConfigError(name, entry, "must be a mapping")
    known = {"count", "devices", "kind", "speed", "tokens_per_device", "memory_gib", "intra", "inter"}
    _refuse_unknown(name, entry, known)
    for required in ("devices", "intra"):
        if required not in entry:
            raise ConfigError(f"{name}.{required}", None, "is missing from the profile")
    tokens, memory = entry.get("tokens_per_device"), entry.get("memory_gib")
    try:
        node = Node(
            num_devices=int(entry["devices"]),
            intra=_read_link(f"{name}.intra", entry["intra"]),
            inter=_read_link(f"{name}.inter", entry["inter"]) if "inter" in entry else None,
            kind=str(entry.get("kind", "device")),
            speed=float(entry.get("speed", 1.0)),
            tokens_per_device=None if tokens is None else int(tokens),
            memory_gib=None if memory is None else float(memory),
        )
        count = int(entry.get("count", 1))
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(name, entry, "must hold numbers") from None
    if count < 1:
        raise ConfigError(f"{name}.count", count, "must be at least 1")
    return [node] * count
