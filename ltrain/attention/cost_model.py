"""Predicted time, bytes and memory of every schedule, from the work of an index and a hardware profile.

Each schedule is played through event by event for all ranks: a step starts when the one before is done and
its keys have arrived; links carry one message at a time each way. So the imbalance of ranks and steps, the
exposed part of an exchange and slow links all show in the result, for 2 ranks or 1,024. Volumes follow the
formulas at the top of each schedule's file. After the alpha-beta models of docs/context_parallel.md, with a
kernel factor for short chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ltrain.attention.profile import Link, Profile
from ltrain.attention.work import Entries, Work
from ltrain.parallel.layout import SequenceLayout


@dataclass(frozen=True)
class Shapes:
    """Heads and sizes of one call; `item` bytes of an element of q, k, v and `wire` of a partial dK or dV."""

    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    item: int = 2
    wire: int = 2
    batch: int = 1

    @property
    def kv_row(self) -> int:
        """Elements of one token's keys and values."""
        return self.batch * self.kv_heads * (self.head_dim + self.value_dim)

    def tile_flops(self, block: int) -> float:
        return 2.0 * self.batch * block * block * (self.head_dim + self.value_dim)


@dataclass(frozen=True)
class Prediction:
    """Times of one layer, seconds; bytes the busiest rank sends in a forward pass, by link; memory beyond
    inputs and outputs in a forward pass, bytes."""

    schedule: str
    forward_s: float
    backward_s: float
    bytes_in_node: float
    bytes_between_nodes: float
    memory_bytes: float

    @property
    def total_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class Setting:
    """Everything a prediction depends on. `needed[r, o]`: token-heads of rank o's keys that rank r visits."""

    work: Work
    shapes: Shapes
    profile: Profile
    needed: np.ndarray | None = None

    @property
    def ranks(self) -> int:
        return self.work.ranks

    @property
    def lanes(self) -> int:
        return min(self.profile.node_size, self.ranks)

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.lanes)

    def kv_bytes(self, element: int) -> np.ndarray:
        """Bytes of every rank's keys and values."""
        return np.array(self.work.lengths, float) * self.shapes.kv_row * element

    def grouped_nodes(self) -> np.ndarray:
        """Tiles between nodes, [nodes, nodes]."""
        return self.work.grouped(self.lanes).reshape(self.nodes, self.lanes, self.nodes).sum(1)

    def call_s(self, tiles: np.ndarray, key_tokens: float, backward: bool, merge: bool = True) -> np.ndarray:
        """Seconds of one attention call a rank, [ranks]; the merge of partial results reads and writes fp32
        once."""
        flops = self.shapes.tile_flops(self.work.block)
        rate = (
            self.profile.kernel_s(1e12, key_tokens)
            / 1e12
            * (self.profile.backward_factor if backward else 1.0)
        )
        rows = (
            np.array(self.work.lengths, float)
            * self.shapes.batch
            * self.shapes.q_heads
            * self.shapes.value_dim
        )
        touched = rows * 12 / (self.profile.memory_gb_s * 1e9) if merge else 0.0
        return np.where(tiles > 0, tiles * flops * rate + touched, 0.0) + self.profile.step_s


def _per_peer(setting: Setting, volume: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Time of an all-to-all of volume[to, from] bytes, and the bytes each rank sends in and between nodes."""
    rank = np.arange(setting.ranks)
    inside = rank[:, None] // setting.lanes == rank[None, :] // setting.lanes
    away = volume * (rank[:, None] != rank[None, :])
    near, far = away * inside, away * ~inside
    busiest = [max(part.sum(0).max(), part.sum(1).max()) for part in (near, far)]
    links = (setting.profile.in_node, setting.profile.between_nodes)
    # Both kinds of link work at once; each peer costs one latency.
    peers = [int((part > 0).sum(1).max()) for part in (near, far)]
    times = [
        link.latency_s * count + size / (link.gb_s * 1e9)
        for link, count, size in zip(links, peers, busiest, strict=True)
    ]
    return max(times), near.sum(0), far.sum(0)


def _ring_time(setting: Setting, backward: bool) -> float:
    """The last rank's finish: hops chain, each link carries one shard at a time."""
    profile, ranks = setting.profile, setting.ranks
    rank = np.arange(ranks)
    kv, grad = setting.kv_bytes(setting.shapes.item), setting.kv_bytes(setting.shapes.wire)
    before = (rank - 1) % ranks
    crosses = rank // setting.lanes != before // setting.lanes
    arrived = np.zeros(ranks)
    finish = np.zeros(ranks)
    tokens = float(np.mean(setting.work.lengths))
    for t in range(ranks):
        owner = (rank - t) % ranks
        start = np.maximum(finish, arrived)
        if t + 1 < ranks:
            coming = (rank - t - 1) % ranks
            hop = _link_time(profile, crosses, kv[coming])
            # The sender passes a shard on when it has it and starts to work on it; the link is free by then.
            arrived = np.maximum(start[before], arrived) + hop
        tiles = setting.work.tiles[rank, owner]
        finish = start + setting.call_s(tiles, tokens, backward)
        if backward and t > 0:
            remote = rank // setting.lanes != owner // setting.lanes
            # dKV of this step shares the way out with the keys of the next.
            sent = _link_time(profile, remote, grad[owner])
            arrived = np.maximum(arrived, start + sent)
            finish = np.maximum(finish, start + sent) if t + 1 == ranks else finish
    return float(finish.max())


def _link_time(profile: Profile, crosses: np.ndarray, size: np.ndarray) -> np.ndarray:
    def time(link: Link) -> np.ndarray:
        return np.asarray(link.latency_s + size / (link.gb_s * 1e9))

    return np.where(crosses, time(profile.between_nodes), time(profile.in_node))


def _ring(setting: Setting) -> Prediction:
    kv = setting.kv_bytes(setting.shapes.item)
    rank = np.arange(setting.ranks)
    crosses = (rank + 1) % setting.ranks // setting.lanes != rank // setting.lanes
    sent = np.array([kv.sum() - kv[(r + 1) % setting.ranks] for r in rank])
    return Prediction(
        "ring", _ring_time(setting, False), _ring_time(setting, True), float((sent * ~crosses).max()),
        float((sent * crosses).max()), 2 * float(kv.max()),
    )  # fmt: skip


def _all_gather(setting: Setting) -> Prediction:
    def time(backward: bool) -> float:
        kv = setting.kv_bytes(setting.shapes.item)
        spread, _, _ = _per_peer(setting, np.broadcast_to(kv[None, :], (setting.ranks, setting.ranks)))
        call = setting.call_s(
            setting.work.tiles.sum(1), float(sum(setting.work.lengths)), backward, merge=False
        )
        if not backward:
            return spread + float(call.max())
        grad = setting.kv_bytes(setting.shapes.wire)
        home, _, _ = _per_peer(setting, np.broadcast_to(grad[:, None], (setting.ranks, setting.ranks)))
        return spread + float(call.max()) + home

    kv = setting.kv_bytes(setting.shapes.item)
    _, near, far = _per_peer(setting, np.broadcast_to(kv[None, :], (setting.ranks, setting.ranks)))
    return Prediction("all_gather", time(False), time(True), near.max(), far.max(), float(kv.sum()))


def _head_trade(setting: Setting, lanes: int) -> tuple[float, float, float, np.ndarray]:
    """Ulysses among runs of `lanes` ranks: (forward s, bytes in node, bytes between, kv heads of each
    lane)."""
    shapes, ranks = setting.shapes, setting.ranks
    q_heads = np.array([len(a) for a in np.array_split(np.arange(shapes.q_heads), lanes)], float)
    if shapes.kv_heads >= lanes:
        kv_heads = np.array([len(a) for a in np.array_split(np.arange(shapes.kv_heads), lanes)], float)
    else:
        kv_heads = np.minimum(1.0, q_heads)
    width = shapes.head_dim + shapes.value_dim
    rows = np.array(setting.work.lengths, float) * shapes.batch
    lane = np.arange(ranks) % lanes
    same = np.arange(ranks)[:, None] // lanes == np.arange(ranks)[None, :] // lanes
    into = (
        rows[None, :]
        * (q_heads[lane] * shapes.head_dim + kv_heads[lane] * width)[:, None]
        * shapes.item
        * same
    )
    back = rows[:, None] * (q_heads[lane] * (shapes.value_dim * shapes.item + 4))[None, :] * same
    first, near1, far1 = _per_peer(setting, into)
    second, near2, far2 = _per_peer(setting, back)
    return first + second, float((near1 + near2).max()), float((far1 + far2).max()), kv_heads


def _ulysses(setting: Setting) -> Prediction:
    trade, near, far, _ = _head_trade(setting, setting.ranks)
    by_member = _dealt_heads(setting, setting.ranks)
    tokens = float(sum(setting.work.lengths))

    def time(backward: bool) -> float:
        flops = setting.shapes.tile_flops(setting.work.block)
        busiest = max(by_member) * flops
        factor = setting.profile.backward_factor if backward else 1.0
        # Backward sends dout and returns dq, dk, dv: as much as forward.
        return trade + setting.profile.kernel_s(busiest, tokens) * factor + setting.profile.step_s

    memory = near + far
    return Prediction("ulysses", time(False), time(True), near, far, memory)


def _dealt_heads(setting: Setting, members: int) -> list[float]:
    from ltrain.attention.schedules.ulysses import deal_heads

    deal = deal_heads(setting.shapes.q_heads, setting.shapes.kv_heads, members, setting.work.by_head)
    return [float(sum(setting.work.by_head[h] for h in heads)) for heads in deal.q_heads]


def _ulysses_ring(setting: Setting) -> Prediction:
    lanes, nodes = setting.lanes, setting.nodes
    trade, near, far, kv_heads = _head_trade(setting, lanes)
    share = np.array(_dealt_heads(setting, lanes))
    share = share / max(share.sum(), 1e-30)
    lengths = np.array(setting.work.lengths, float).reshape(nodes, lanes).sum(1)
    by_node = setting.grouped_nodes()
    width = setting.shapes.batch * (setting.shapes.head_dim + setting.shapes.value_dim) * kv_heads.max()
    link = setting.profile.between_nodes
    flops = setting.shapes.tile_flops(setting.work.block)

    def time(backward: bool) -> float:
        factor = setting.profile.backward_factor if backward else 1.0
        total = 0.0
        for t in range(nodes):
            pair = by_node[np.arange(nodes), (np.arange(nodes) - t) % nodes]
            call = (
                setting.profile.kernel_s(float(pair.max() * share.max()) * flops, float(lengths.mean()))
                * factor
            )
            call += setting.profile.step_s
            hop = link.time(lengths.max() * width * setting.shapes.item) if t + 1 < nodes else 0.0
            if backward and t > 0:
                hop += link.time(lengths.max() * width * setting.shapes.wire)
            total += max(call, hop)
        return trade + total

    moved = float(lengths.max() * width * setting.shapes.item * (nodes - 1))
    memory = near + far + 2 * lengths.max() * width * setting.shapes.item
    return Prediction("ulysses_ring", time(False), time(True), near, far + moved, float(memory))


def _hierarchical(setting: Setting) -> Prediction:
    lanes, nodes = setting.lanes, setting.nodes
    kv = setting.kv_bytes(setting.shapes.item).max()
    grad = setting.kv_bytes(setting.shapes.wire).max()
    near, far = setting.profile.in_node, setting.profile.between_nodes
    pairs = setting.work.grouped(lanes)
    node = np.arange(setting.ranks) // lanes
    tokens = float(np.mean(setting.work.lengths)) * lanes

    def time(backward: bool) -> float:
        gather = near.latency_s * (lanes - 1) + (lanes - 1) * kv / (near.gb_s * 1e9)
        reduce = near.latency_s * (lanes - 1) + (lanes - 1) * grad / (near.gb_s * 1e9)
        # Outer shards arrive one after another from the start; the way home shares the link in the backward
        # pass.
        outer = far.time(kv) + (far.time(grad) if backward else 0.0)
        finish, gathered = 0.0, gather
        for a in range(nodes):
            start = max(finish, gathered)
            call = setting.call_s(pairs[np.arange(setting.ranks), (node - a) % nodes], tokens, backward)
            finish = start + float(call.max()) + (reduce if backward else 0.0)
            if a + 1 < nodes:
                ready = max(start if a > 0 else finish, (a + 1) * outer)
                gathered = ready + gather
        return finish + (far.time(grad) if backward and nodes > 1 else 0.0)

    return Prediction(
        "hierarchical", time(False), time(True), nodes * (lanes - 1) * float(kv), (nodes - 1) * float(kv),
        (2 * lanes + 2) * float(kv),
    )  # fmt: skip


def _nested_ring(setting: Setting) -> Prediction:
    lanes, nodes, ranks = setting.lanes, setting.nodes, setting.ranks
    kv = setting.kv_bytes(setting.shapes.item).max()
    grad = setting.kv_bytes(setting.shapes.wire).max()
    near, far = setting.profile.in_node, setting.profile.between_nodes
    rank = np.arange(ranks)
    tokens = float(np.mean(setting.work.lengths))

    def time(backward: bool) -> float:
        finish, arrived = 0.0, 0.0
        outer = far.time(kv) + (far.time(grad) if backward else 0.0)
        for t in range(ranks):
            start = max(finish, arrived)
            a, b = divmod(t + 1, lanes)
            inner = near.time(kv) + (near.time(grad) if backward else 0.0)
            # The next shard leaves its lane when that lane has it from across nodes (one ahead for lanes
            # below b).
            have = (a + (1 if b else 0)) * outer if a + 1 < nodes else a * outer
            arrived = max(start, min(have, (nodes - 1) * outer)) + inner
            call = setting.call_s(setting.work.tiles[rank, (rank - t) % ranks], tokens, backward)
            finish = start + float(call.max())
        return finish + (near.time(grad) + far.time(grad) if backward else 0.0)

    inside = (nodes - 1 / lanes) * (lanes - 1) * float(kv)
    return Prediction("nested_ring", time(False), time(True), inside, (nodes - 1) * float(kv), 5 * float(kv))


def _needed(setting: Setting, name: str = "needed") -> Prediction:
    assert setting.needed is not None
    per_token_head = setting.shapes.batch * (setting.shapes.head_dim + setting.shapes.value_dim)
    volume = setting.needed * float(per_token_head)
    own = np.diag(setting.work.tiles)
    rest = setting.work.tiles.sum(1) - own
    tokens = float(np.mean(setting.work.lengths))
    move, near, far = _per_peer(setting, volume * setting.shapes.item)
    home, _, _ = _per_peer(setting, volume.T * setting.shapes.wire)

    def time(backward: bool) -> float:
        first = float(setting.call_s(own, tokens, backward).max())
        second = float(setting.call_s(rest, tokens, backward).max())
        return max(first, move) + second + (home if backward else 0.0)

    memory = float((volume * setting.shapes.item).sum(1).max())
    return Prediction(name, time(False), time(True), near.max(), far.max(), memory)


MODELS: dict[str, Callable[[Setting], Prediction]] = {
    "ring": _ring,
    "all_gather": _all_gather,
    "ulysses": _ulysses,
    "hierarchical": _hierarchical,
    "nested_ring": _nested_ring,
    "ulysses_ring": _ulysses_ring,
    "needed": _needed,
    "halo": lambda setting: _needed(setting, "halo"),
}


def predict(schedule: str, setting: Setting) -> Prediction:
    """The prediction of one schedule. Needs whole nodes for the schedules on nodes, and `needed` for its own
    two."""
    return MODELS[schedule](setting)


def needed_token_heads(entries: Entries, layout: SequenceLayout, kv_heads: int) -> np.ndarray:
    """Token-heads of rank o's keys that rank r visits, [ranks, ranks], the diagonal 0: what `needed`
    moves."""
    ranks, owner = layout.world_size, layout.block_owner
    length = np.full(layout.num_blocks, layout.block)
    if layout.num_blocks:
        length[-1] -= layout.num_blocks * layout.block - layout.num_tokens
    total = np.zeros((ranks, ranks))
    per_kv = max(entries.num_heads // kv_heads, 1)
    groups = entries.num_heads // per_kv
    for g in range(groups):
        seen = np.zeros((ranks, layout.num_blocks), bool)
        of_group = entries.head // per_kv == g
        seen[owner[entries.row[of_group]], entries.col[of_group]] = True
        for rank in range(ranks):
            total[rank] += np.bincount(owner[seen[rank]], length[seen[rank]], minlength=ranks)
    np.fill_diagonal(total, 0.0)
    return total * (kv_heads // groups)
