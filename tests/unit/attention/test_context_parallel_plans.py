"""Planning under context parallelism, without processes: work, balance, predictions, heads, needed blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ltrain.attention.choose import candidates, choose
from ltrain.attention.cost_model import MODELS, Setting, Shapes, needed_token_heads, predict
from ltrain.attention.profile import PROFILES, Profile, device_name
from ltrain.attention.schedules.base import Problem
from ltrain.attention.schedules.halo import halo_blocks
from ltrain.attention.schedules.needed import needed_blocks, rows_of
from ltrain.attention.schedules.nodes import Nodes
from ltrain.attention.schedules.ulysses import deal_heads
from ltrain.attention.work import Entries, Work, balanced_layout, visible_entries
from ltrain.config.base import ConfigError
from ltrain.parallel.layout import SequenceLayout
from ltrain_kernels.block_sparse import BlockIndex, ListIndex, closed


def slashes(num_blocks: int, heads: int, density: float, seed: int = 0, near: int = 64) -> Entries:
    """Block-Toeplitz masks: the `near` offsets next to the diagonal and random ones, log-uniform, up to
    `density`."""
    rng = np.random.default_rng(seed)
    rows, cols, of_head = [], [], []
    for head in range(heads):
        far = np.unique(np.exp(rng.uniform(0, np.log(num_blocks), 2000)).astype(int))
        offsets = list(range(near))
        area = sum(num_blocks - o for o in offsets)
        for offset in rng.permutation(far[far >= near]):
            if area >= density * num_blocks * (num_blocks + 1) / 2:
                break
            offsets.append(offset)
            area += num_blocks - offset
        for offset in offsets:
            rows.append(np.arange(offset, num_blocks))
            cols.append(np.arange(num_blocks - offset))
            of_head.append(np.full(num_blocks - offset, head))
    return Entries(np.concatenate(rows), np.concatenate(cols), np.concatenate(of_head), heads, 1)


@pytest.fixture(scope="module")
def slash_work() -> tuple[Entries, SequenceLayout, Work]:
    entries = slashes(4096, 16, 0.05)
    layout = SequenceLayout("striped", 524288, 32)
    return entries, layout, Work.of(entries, layout, 16)


def test_striped_slashes_are_even_at_512k_on_32_ranks(
    slash_work: tuple[Entries, SequenceLayout, Work],
) -> None:
    entries, layout, work = slash_work
    assert work.imbalance <= 1.05
    assert work.step_imbalance <= 1.10
    zigzag = Work.of(entries, SequenceLayout("zigzag", layout.num_tokens, 32), 16)
    assert zigzag.step_imbalance > work.step_imbalance + 0.2


def test_published_layer_times_are_reproduced(slash_work: tuple[Entries, SequenceLayout, Work]) -> None:
    """arXiv 2510.18830: 34.10 ms with the flat ring, 19.53 ms with nested rings, 1.13 ms of each to
    select."""
    _, _, work = slash_work
    setting = Setting(work, Shapes(16, 2, 128, 128), PROFILES["a100-40gb-hdr"])
    for schedule, published_ms in (("ring", 34.10), ("nested_ring", 19.53)):
        predicted_ms = predict(schedule, setting).forward_s * 1e3 + 1.13
        assert abs(predicted_ms / published_ms - 1) <= 0.15


@pytest.mark.parametrize("world", [32])
def test_patterns_are_even_at_512k(world: int) -> None:
    layout = SequenceLayout("striped", 524288, world)
    rng = np.random.default_rng(1)
    blocks = layout.num_blocks
    documents = torch.repeat_interleave(torch.arange(64), 524288 // 64)
    window = closed.sliding_window(524288, 128, local=33)
    strided = closed.strided(524288, 128, local=16, stride=8, residues=list(range(8)))
    columns = torch.from_numpy(np.sort(rng.integers(0, blocks, (1, 1, blocks, 64)), -1))
    chosen = BlockIndex.from_rows(columns, blocks, 128, 128, allow_repeats=True, causal=True)
    for index, heads, docs in (
        (window, 8, None),
        (strided, 8, None),
        (chosen, 8, None),
        (closed.dense(524288, 128), 8, documents),
    ):
        _, work = balanced_layout(index, layout, heads, docs)
        assert work.imbalance <= 1.05


def test_uneven_masks_are_dealt_longest_first() -> None:
    layout = SequenceLayout("striped", 64 * 128, 4)
    mask = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    mask[..., torch.arange(64), torch.arange(64)] = True
    mask[0, 0, ::4] = True
    index = BlockIndex.from_mask(mask, 128, 128, causal=True)
    before = Work.of(visible_entries(index, layout, 2), layout, 2)
    dealt, after = balanced_layout(index, layout, 2)
    assert before.imbalance > 2
    assert dealt.kind == "dealt"
    assert after.imbalance <= 1.05
    assert max(dealt.lengths) == min(dealt.lengths)


def test_work_counts_every_visible_block_once() -> None:
    mask = torch.rand(1, 3, 11, 11, generator=torch.Generator().manual_seed(0)) < 0.5
    index = BlockIndex.from_mask(mask, 16, 16)
    layout = SequenceLayout("striped", 170, 3, 16)
    work = Work.of(visible_entries(index, layout, 6), layout, 6)
    causal = (mask & torch.ones(11, 11).tril().bool()).sum((0, 2, 3))
    assert work.tiles.sum() == 2 * int(causal.sum())
    assert work.by_head.tolist() == [c for c in causal.tolist() for _ in range(2)]


@pytest.mark.parametrize(
    ("num_q", "num_kv", "members"), [(8, 4, 4), (6, 2, 4), (5, 5, 3), (2, 1, 4), (12, 3, 5)]
)
def test_heads_are_dealt_once(num_q: int, num_kv: int, members: int) -> None:
    rng = np.random.default_rng(num_q)
    for work in (None, rng.random(num_q)):
        deal = deal_heads(num_q, num_kv, members, work)
        assert sorted(h for heads in deal.q_heads for h in heads) == list(range(num_q))
        for q_heads, kv_heads, place in zip(deal.q_heads, deal.kv_heads, deal.kv_of_q, strict=True):
            assert [kv_heads[p] for p in place] == [h // (num_q // num_kv) for h in q_heads]
        if num_kv >= members:
            assert max(len(h) for h in deal.q_heads) <= -(-num_kv // members) * (num_q // num_kv)


def test_uneven_heads_are_dealt_by_work() -> None:
    work = np.array([8.0, 1, 1, 1, 1, 4, 4, 4])
    deal = deal_heads(8, 8, 4, work)
    loads = [sum(work[list(h)]) for h in deal.q_heads]
    assert max(loads) == 9
    assert max(sum(work[2 * i : 2 * i + 2]) for i in range(4)) > max(loads) - 1


def problem(
    index: BlockIndex, layout: SequenceLayout, q_heads: int = 8, kv_heads: int = 8, **more: object
) -> Problem:
    return Problem(
        layout, index, None, 1, q_heads, kv_heads, 128, 128, torch.bfloat16, torch.device("cpu"), **more
    )  # type: ignore[arg-type]


def test_head_sharded_strided_context_moves_the_closed_form() -> None:
    """S2 at 128K on 8 ranks, 8 kv heads, 16 local blocks, every 8th block of 64: at most 70 MB a layer,
    forward."""
    tokens, ranks, heads, local, stride, block = 131072, 8, 8, 16, 8, 64
    index = closed.strided(
        tokens, block, local=local, stride=stride, residues=[-h % stride for h in range(heads)]
    )
    layout = SequenceLayout("contiguous", tokens, ranks, block)
    blocks = layout.num_blocks
    needed = needed_blocks(problem(index, layout))
    own = blocks // ranks
    for rank in range(ranks):
        for head in range(heads):
            first = rank * own
            halo = set(range(max(first - local + 1, 0), first))
            strided = {j for j in range(first) if j % stride == -head % stride}
            assert set(np.flatnonzero(needed.of(rank)[head])) == halo | strided
    received = np.array([needed.of(rank).sum() for rank in range(ranks)]) * block * (128 + 128) * 2
    assert received.max() <= 70e6
    pairs = needed_token_heads(visible_entries(index, layout, heads), layout, heads)
    assert (pairs.sum(1) * 256 * 2).tolist() == received.tolist()


@pytest.mark.parametrize("window", [None, 40, 100])
@pytest.mark.parametrize("kind", ["striped", "zigzag", "contiguous"])
def test_the_closed_form_of_needed_blocks_is_what_the_entries_say(kind, window) -> None:
    tokens, block = 1000, 16
    layout = SequenceLayout(kind, tokens, 5, block)
    residues = [-h % 3 for h in range(4)]
    for index in (
        closed.strided(tokens, block, local=4, stride=3, residues=residues, sinks=2, dense_heads=[1]),
        closed.strided(tokens, block, local=2, stride=3, residues=residues[:2]),
        closed.sliding_window(tokens, block, local=3, sinks=1),
        closed.dense(tokens, block),
    ):
        whole = needed_blocks(problem(index, layout, 4, 2, window=window))
        listed = needed_blocks(problem(index.to_lists(), layout, 4, 2, window=window))
        assert isinstance(index.to_lists(), ListIndex) and whole.classes >= listed.classes
        for rank in range(5):
            want = np.broadcast_to(listed.of(rank), (whole.classes, layout.num_blocks))
            assert np.array_equal(whole.of(rank), want), (kind, rank)


def test_a_plan_of_a_million_tokens_of_strided_context_is_small() -> None:
    """Index and exchange of S2 at 1M tokens with 8 kv heads: no list of its 134 million entries anywhere."""
    tokens, ranks, block = 1 << 20, 64, 64
    index = closed.strided(tokens, block, local=16, stride=8, residues=[-h % 8 for h in range(8)])
    layout = SequenceLayout("contiguous", tokens, ranks, block)
    whole = problem(index, layout, 32, 8)
    mine = needed_blocks(whole).of(ranks - 1)
    held = [np.flatnonzero(heads) for heads in mine]
    into = rows_of(whole, held, (mine & (layout.block_owner == peer) for peer in range(ranks)))
    assert index.nbytes + into.nbytes < 10e6
    assert sum(into.sizes) == mine.sum() * block == len(into.token) == len(into.head)


def test_halo_is_a_small_share_of_the_ring() -> None:
    """A window of 4K at 1M tokens on 64 ranks: 1/250 of the ring's bytes."""
    tokens, ranks = 1 << 20, 64
    layout = SequenceLayout("contiguous", tokens, ranks)
    index = closed.sliding_window(tokens, 128, local=33)
    needed = halo_blocks(problem(index, layout, window=4096))
    moved = max(needed.of(rank).sum() for rank in range(ranks)) * 128
    ring = (ranks - 1) * tokens // ranks
    assert ring / moved >= 250


def test_halo_refuses_what_reaches_too_far() -> None:
    layout = SequenceLayout("contiguous", 1024, 4, 16)
    halo_blocks(problem(closed.sliding_window(1024, 16, local=17), layout))
    for index, where in (
        (closed.sliding_window(1024, 16, local=18), layout),
        (closed.dense(1024, 16), layout),
        (closed.sliding_window(1024, 16, local=4), SequenceLayout("striped", 1024, 4, 16)),
    ):
        with pytest.raises(ConfigError, match="reach"):
            halo_blocks(problem(index, where))


def test_auto_follows_the_network() -> None:
    tokens = 65536
    layout = SequenceLayout("striped", tokens, 16)
    dense = problem(closed.dense(tokens, 128), layout, 32, 8)
    fast, why = choose(dense, PROFILES["h100-ndr"], 8)
    slow, _ = choose(dense, PROFILES["ethernet-100g"], 8)
    assert slow in ("hierarchical", "nested_ring", "ulysses_ring")
    assert fast in why and "16 ranks" in why
    window = problem(
        closed.sliding_window(tokens, 128, local=9), SequenceLayout("contiguous", tokens, 16), 32, 8
    )
    assert choose(window, PROFILES["h100-ndr"], 8)[0] in ("halo", "needed")
    assert "hierarchical" not in candidates(dense, None)


def test_auto_keeps_to_a_memory_limit() -> None:
    layout = SequenceLayout("striped", 65536, 8)
    dense = problem(closed.dense(65536, 128), layout, 8, 2)
    setting_free = choose(dense, PROFILES["h100-ndr"], None)[0]
    tight, _ = choose(dense, PROFILES["h100-ndr"], None, memory_limit=1.0)
    assert setting_free != "ring"
    assert tight == "ring"


def test_predictions_are_positive_and_ordered() -> None:
    layout = SequenceLayout("striped", 32768, 8)
    entries = visible_entries(closed.dense(32768, 128), layout, 8)
    work = Work.of(entries, layout, 8)
    setting = Setting(
        work, Shapes(8, 8, 64, 64), PROFILES["h100-ndr"], needed_token_heads(entries, layout, 8)
    )
    for name in MODELS:
        found = predict(name, setting)
        assert 0 < found.forward_s < found.backward_s


def test_nodes_must_divide() -> None:
    with pytest.raises(ConfigError, match=r"node_size=3 must divide the group's 8 ranks.*use one of"):
        Nodes.of(8, 3, "hierarchical")
    with pytest.raises(ConfigError, match="must be given"):
        Nodes.of(8, None, "hierarchical")


def test_profile_of_another_machine_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    profile = PROFILES["h200"]
    profile.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == profile
    profile.check_machine(torch.device("cpu"))
    import dataclasses

    other = dataclasses.replace(profile, device="some other machine")
    with pytest.raises(ConfigError, match=r"profile.device"):
        other.check_machine(torch.device("cpu"))
    dataclasses.replace(profile, device=device_name(torch.device("cpu"))).check_machine(torch.device("cpu"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match="exactly the fields"):
        Profile.load(tmp_path / "bad.json")
