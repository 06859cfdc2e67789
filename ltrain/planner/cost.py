"""Seconds and bytes of a document in a group: compute, exchange by schedule, memory.

Follows arXiv 2412.01523, section 4.1 (time linear in the sum of per-sequence terms, memory linear in tokens),
grown by the pattern's work, unequal members, several exchange schedules and an efficiency by chunk length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.planner.cluster import ClusterSpec, Node
from ltrain.planner.kinds import GroupKind
from ltrain.planner.work import DenseWork, Work

SCHEDULES = ("ulysses", "ring", "ulysses_ring")
LOCAL = "local"
# Ulysses moves q, k, v and o once each way; a ring moves k, v forward, and k, v, dk, dv backward: 6 of 8
# tensors.
_RING_SHARE = 0.75


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that a device needs: `state_bytes` whatever it holds, plus the level's bytes for every token of
    its shard.

    `bytes_per_token` maps a memory level's name (how much is kept for the backward) to bytes; `level` is the
    one in use.
    """

    bytes_per_token: Mapping[str, float]
    level: str
    state_bytes: float = 0.0

    def __post_init__(self) -> None:
        if self.level not in self.bytes_per_token:
            known = ", ".join(self.bytes_per_token)
            raise ConfigError("cost.memory.level", self.level, f"must be one of {known}")
        if min(self.bytes_per_token.values()) <= 0 or self.state_bytes < 0:
            raise ConfigError("cost.memory.bytes_per_token", dict(self.bytes_per_token), "must be positive")

    def tokens(self, memory_gib: float) -> int:
        """Tokens that fit into `memory_gib` beside the states; 0 where the states alone are too large."""
        return max(0, int((memory_gib * 2**30 - self.state_bytes) / self.bytes_per_token[self.level]))


@dataclass(frozen=True)
class Terms:
    """Seconds of sequences in one kind of group: arrays [S], and `fixed` once a micro-batch.

    `exchange` is what stays visible of the transfer, `latency` its messages once a micro-batch; `attention`
    and `linear` are compute.
    """

    attention: np.ndarray
    linear: np.ndarray
    exchange: np.ndarray
    fixed: float
    latency: float = 0.0

    @property
    def total(self) -> np.ndarray:
        return self.attention + self.linear + self.exchange


@dataclass(frozen=True)
class CostModel:
    """Time of one micro-batch on one group: fixed_s + sum over its sequences of compute and exchange.

    - `attention_s`: seconds per token^2 of `work` on one device of speed 1; `linear_s`: seconds per token;
      `fixed_s`: seconds per micro-batch and group.
    - `bytes_per_token`: bytes that all-to-all moves per token in a step, all layers and both passes (16 x
      layers x hidden size for bf16 with as many key/value heads as query heads).
    - `work`: the attention pattern's work by length; `num_heads`, `num_kv_heads`: limit head-sharded degrees
      and shrink the exchange of keys and values (None: no limit, equal numbers).
    - `schedules`: exchanges that a group may choose from; `overlap`: the share of attention's time behind
      which a ring's transfer can hide.
    - `efficiency`: (chunk tokens, share of peak) pairs: attention on chunks of that many tokens per device is
      slower by the share, interpolated in the logarithm of the chunk.
    - `num_exchanges`: messages in sequence per step of the schedule and micro-batch, each paying the link's
      latency; a measured one need not be whole.
    - `exchange_scale`: correction of the transfer found by measurement.
    """

    attention_s: float
    linear_s: float
    fixed_s: float
    bytes_per_token: float
    work: Work = field(default_factory=DenseWork)
    num_heads: int | None = None
    num_kv_heads: int | None = None
    schedules: tuple[str, ...] = SCHEDULES
    overlap: float = 1.0
    efficiency: tuple[tuple[int, float], ...] = ()
    memory: MemoryModel | None = None
    num_exchanges: float = 0.0
    exchange_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in (
            "attention_s",
            "linear_s",
            "fixed_s",
            "bytes_per_token",
            "exchange_scale",
            "num_exchanges",
        ):
            value = getattr(self, name)
            if not (value >= 0 and np.isfinite(value)):
                raise ConfigError(f"cost.{name}", value, "must be a finite number of 0 or more")
        if self.attention_s == 0 and self.linear_s == 0:
            raise ConfigError("cost.linear_s", 0.0, "must be positive where attention_s is 0")
        unknown = [name for name in self.schedules if name not in SCHEDULES]
        if unknown or not self.schedules:
            raise ConfigError("cost.schedules", self.schedules, f"must be some of {', '.join(SCHEDULES)}")
        if not 0 <= self.overlap <= 1:
            raise ConfigError("cost.overlap", self.overlap, "must be in 0..1")
        chunks = [chunk for chunk, _ in self.efficiency]
        if any(not 0 < share <= 1 for _, share in self.efficiency) or chunks != sorted(set(chunks)):
            raise ConfigError(
                "cost.efficiency", self.efficiency, "must be rising chunks with shares in (0, 1]"
            )

    def scaled(self, compute: float, linear: float, fixed: float, exchange: float) -> CostModel:
        """The model with its four terms multiplied: attention, linear, fixed, exchange."""
        return replace(
            self,
            attention_s=self.attention_s * compute,
            linear_s=self.linear_s * linear,
            fixed_s=self.fixed_s * fixed,
            exchange_scale=self.exchange_scale * exchange,
            num_exchanges=self.num_exchanges * exchange,
        )

    def tokens_of(self, node: Node) -> int:
        """Tokens of activations that one device of the node holds. Raises ConfigError where that can't be
        known."""
        if node.tokens_per_device is not None:
            return node.tokens_per_device
        if self.memory is None or node.memory_gib is None:
            raise ConfigError(
                "cost.memory",
                None,
                "is needed: the cluster gives memory in GiB",
                "give bytes per token by level",
            )
        return self.memory.tokens(node.memory_gib)

    def tokens_by_island(self, cluster: ClusterSpec) -> list[int]:
        return [self.tokens_of(island.node) for island in cluster.islands]

    def schedules_for(self, kind: GroupKind) -> tuple[str, ...]:
        """The schedules that a group of this kind can run, in the order of `schedules`."""
        if kind.degree == 1:
            return (LOCAL,)
        return tuple(name for name in self.schedules if self._serves(name, kind))

    def _serves(self, schedule: str, kind: GroupKind) -> bool:
        heads = self.num_heads
        if schedule == "ring":
            return True
        if not kind.even:
            return False
        if schedule == "ulysses":
            return heads is None or heads % kind.degree == 0
        even_nodes = (
            kind.num_nodes > 1 and kind.degree == kind.num_nodes * kind.per_node and kind.per_node > 1
        )
        return even_nodes and (heads is None or heads % kind.per_node == 0)

    def terms(self, kind: GroupKind, lengths: np.ndarray, schedule: str) -> Terms:
        """Seconds of sequences of `lengths` tokens [S] in a group of this kind under one schedule."""
        tokens = np.asarray(lengths, dtype=np.float64)
        attention = self.attention_s * np.asarray(self.work(tokens), dtype=np.float64) * kind.compute_scale
        if self.efficiency:
            chunks, shares = zip(*self.efficiency, strict=True)
            at = np.log(np.maximum(tokens * kind.max_weight, 1.0))
            attention = attention / np.interp(at, np.log(chunks), shares)
        linear = self.linear_s * tokens * kind.compute_scale
        exchange, steps = self._exchange(kind, tokens, attention, schedule)
        latency = steps * self.num_exchanges * kind.latency_s
        return Terms(attention, linear, exchange, self.fixed_s, latency)

    def _exchange(
        self, kind: GroupKind, tokens: np.ndarray, attention: np.ndarray, schedule: str
    ) -> tuple[np.ndarray, int]:
        """Visible seconds of the exchange [S], and its messages in sequence."""
        if schedule == LOCAL:
            return np.zeros_like(tokens), 0
        volume = self.bytes_per_token * tokens * self.exchange_scale / 1e9
        if schedule == "ulysses":
            return self._all_to_all(kind, volume), 1
        if schedule == "ring":
            steps = kind.degree - 1
            rate = kind.inter_gb_s if kind.num_nodes > 1 else kind.intra_gb_s
            moved = _RING_SHARE * self._kv_share(1) * volume * (1.0 - kind.max_weight)
            return np.maximum(0.0, moved / rate - self.overlap * attention), steps
        u, r = kind.per_node, kind.num_nodes
        inside = volume * self._moved_share(u) / kind.degree * (u - 1) / u / kind.intra_gb_s
        across = _RING_SHARE * self._kv_share(u) * volume * (r - 1) / (r * u) / kind.inter_gb_s
        return inside + np.maximum(0.0, across - self.overlap * attention), r

    def _all_to_all(self, kind: GroupKind, volume: np.ndarray) -> np.ndarray:
        held = volume * self._moved_share(kind.degree) / kind.degree
        if kind.measured_gb_s is not None:
            return held / kind.measured_gb_s
        inside = held * (kind.per_node - 1) / kind.degree / kind.intra_gb_s
        if kind.num_nodes == 1:
            return inside
        # Both networks work at once; the slower one is what one waits for.
        return np.maximum(inside, held * (kind.degree - kind.per_node) / kind.degree / kind.inter_gb_s)

    def _kv_share(self, head_shards: int) -> float:
        """Key/value heads over query heads; fewer heads than shards are replicated."""
        if self.num_heads is None or self.num_kv_heads is None:
            return 1.0
        return min(1.0, max(self.num_kv_heads, head_shards) / self.num_heads)

    def _moved_share(self, head_shards: int) -> float:
        return (1.0 + self._kv_share(head_shards)) / 2.0
