"""Cluster, cost, buckets, division, partitions, bounds and tasks, each on its own."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest

from ltrain.config.base import ConfigError
from ltrain.parallel.layout import SequenceLayout
from ltrain.planner import ClusterSpec, CostModel, Link, MemoryModel, Node, plan_batch
from ltrain.planner.aggregate import aggregated_bound, dual_feasible
from ltrain.planner.bounds import area_bound
from ltrain.planner.buckets import bucketize
from ltrain.planner.divide import divide
from ltrain.planner.enumerate import solve_by_enumeration
from ltrain.planner.groups import all_groups, block_owners, rank_tasks, shard_lengths
from ltrain.planner.kinds import group_kinds
from ltrain.planner.mixes import MIXES, mix
from ltrain.planner.partitions import TooManyPartitionsError, all_partitions
from ltrain.planner.problem import BatchTable
from ltrain.planner.work import DenseWork, DensityWork, MixedWork, TableWork, WindowWork

COST = CostModel(5e-9, 1.8e-4, 0.6, 2e6, schedules=("ulysses",))
PROFILE = {
    "nodes": [
        {
            "count": 2,
            "devices": 4,
            "kind": "A",
            "tokens_per_device": 1000,
            "intra": {"gb_s": 100},
            "inter": {"gb_s": 5, "latency_s": 1e-5},
        }
    ]
}


def test_profiles_round_trip_and_count_devices(tmp_path) -> None:
    spec = ClusterSpec.from_dict(PROFILE)
    spec.save(tmp_path / "cluster.json")
    assert ClusterSpec.from_file(tmp_path / "cluster.json") == spec
    assert spec.num_devices == 8 and len(spec.islands) == 1
    with pytest.raises(ConfigError, match="16 shards"):
        spec.check_world(16)


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("intra",), None, "intra"),
        (("inter",), None, "inter"),
        (("devices",), None, "devices"),
        (("tokens_per_device",), None, "tokens_per_device"),
        (("speed",), -1, "speed"),
        (("intra",), {}, "gb_s"),
        (("intra",), {"gb_s": "fast"}, "numbers"),
        (("oops",), 1, "oops"),
        (("count",), 0, "count"),
        (("memory_gib",), 40, "not both"),
    ],
)
def test_profiles_that_miss_something_are_refused(path, value, match) -> None:
    entry = dict(PROFILE["nodes"][0])
    entry.pop(path[0], None)
    if value is not None:
        entry[path[0]] = value
    with pytest.raises(ConfigError, match=match):
        ClusterSpec.from_dict({"nodes": [entry]})


def test_a_missing_profile_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        ClusterSpec.from_file(tmp_path / "nowhere.yaml")


def test_group_time_follows_the_published_formula() -> None:
    spec = ClusterSpec.uniform(16, 8, 100.0, 5.0, 10_000, all_to_all_gb_s={4: 80.0, 16: 9.0})
    for kind in group_kinds(spec, [10_000], "powers_of_two"):
        if kind.degree in (4, 16):
            d, s = kind.degree, np.array([5000.0, 700.0])
            terms = COST.terms(kind, s, "ulysses")
            rate = {4: 80.0, 16: 9.0}[d] * 1e9
            assert np.allclose(terms.total, (5e-9 * s**2 + 1.8e-4 * s) / d + 2e6 * s / (d * rate))
            assert terms.fixed == 0.6


def test_unmeasured_degrees_pay_the_slower_network() -> None:
    spec = ClusterSpec.uniform(16, 8, 100.0, 5.0, 10_000)
    kinds = {kind.degree: kind for kind in group_kinds(spec, [10_000], "powers_of_two")}
    s = np.array([1600.0])
    exchange = {d: float(COST.terms(kinds[d], s, "ulysses").exchange[0]) for d in (2, 8, 16)}
    assert exchange[8] == pytest.approx(2e6 * 1600 / 8 * 7 / 8 / 100e9)
    assert exchange[16] == pytest.approx(2e6 * 1600 / 16 * 8 / 16 / 5e9)


def test_a_ring_hides_behind_attention_and_the_group_takes_the_cheaper_exchange() -> None:
    spec = ClusterSpec.uniform(16, 8, 100.0, 5.0, 100_000)
    kind = group_kinds(spec, [100_000], [16])[0]
    ring = CostModel(5e-9, 1.8e-4, 0.6, 2e6, schedules=("ring",))
    long, short = np.array([1_000_000.0]), np.array([1000.0])
    assert ring.terms(kind, long, "ring").exchange[0] == 0.0
    assert ring.terms(kind, short, "ring").exchange[0] > 0.0
    table = BatchTable([1_000_000, 1000], spec, CostModel(5e-9, 1.8e-4, 0.6, 2e6), degrees=[16])
    assert table.best_schedule(table.kinds[0], np.array([1]))[0] == "ulysses"
    times = {name: float(times[0][0]) for name, times in table._tables[0].items()}
    assert table.best_schedule(table.kinds[0], np.array([0]))[0] == min(times, key=times.get)


def test_heads_limit_head_sharded_degrees_and_shrink_keys_and_values() -> None:
    spec = ClusterSpec.uniform(16, 8, 100.0, 5.0, 1000)
    kinds = {kind.degree: kind for kind in group_kinds(spec, [1000], "powers_of_two")}
    cost = CostModel(5e-9, 1.8e-4, 0.6, 2e6, num_heads=8, num_kv_heads=2)
    assert "ulysses" not in cost.schedules_for(kinds[16]) and "ulysses_ring" in cost.schedules_for(kinds[16])
    s = np.array([500.0])
    full = CostModel(5e-9, 1.8e-4, 0.6, 2e6).terms(kinds[2], s, "ulysses").exchange[0]
    assert cost.terms(kinds[2], s, "ulysses").exchange[0] == pytest.approx(full * (1 + 2 / 8) / 2)


def test_work_models() -> None:
    s = np.array([10.0, 1000.0, 100_000.0])
    assert np.array_equal(WindowWork(10**6)(s), DenseWork()(s))
    pairs = [sum(min(i + 1, 64) for i in range(n)) for n in (10, 1000)]
    assert np.allclose(
        WindowWork(64)(s)[:2], [2 * p - min(n, 64) for p, n in zip(pairs, (10, 1000), strict=True)]
    )
    assert np.allclose(DensityWork(0.1)(s), 0.1 * s**2)
    assert np.allclose(MixedWork(((0.5, DenseWork()), (0.5, DensityWork(0.1))))(s), 0.55 * s**2)
    assert np.allclose(TableWork((10, 1000), (100.0, 1e6))(s), s**2)
    for work in (WindowWork(64), DensityWork(0.1, 0.01, 128), TableWork((1, 2), (1.0, 4.0))):
        assert np.all(np.diff(work(np.arange(1.0, 5000.0))) > 0)
        assert pickle.loads(pickle.dumps(work)) == work


def test_sparse_work_and_efficiency_change_the_time() -> None:
    kind = group_kinds(ClusterSpec.uniform(1, 1, 1.0, 1.0, 10**6), [10**6], [1])[0]
    s = np.array([50_000.0])
    dense = COST.terms(kind, s, "local").attention[0]
    sparse = CostModel(5e-9, 1.8e-4, 0.6, 2e6, work=DensityWork(0.05)).terms(kind, s, "local").attention[0]
    slow = CostModel(5e-9, 1.8e-4, 0.6, 2e6, efficiency=((128, 0.5), (65536, 1.0)))
    assert sparse == pytest.approx(0.05 * dense)
    assert slow.terms(kind, np.array([128.0]), "local").attention[0] == pytest.approx(2 * 5e-9 * 128**2)
    assert dense < slow.terms(kind, s, "local").attention[0] < 1.1 * dense


def test_memory_by_level_decides_the_longest_sequence() -> None:
    node = Node(2, Link(100.0), memory_gib=10.0)
    spec = ClusterSpec((node,))

    def cost(level: str) -> CostModel:
        return CostModel(
            5e-9, 1e-4, 0.0, 1e6, memory=MemoryModel({"all": 2**22, "little": 2**20}, level, 2**30)
        )

    assert cost("all").tokens_of(node) == 9 * 256 and cost("little").tokens_of(node) == 9 * 1024
    plan_batch([18_000], spec, cost("little"))
    with pytest.raises(ConfigError, match=r"70\.3 GiB.*4608 tokens"):
        plan_batch([18_000], spec, cost("all"))
    with pytest.raises(ConfigError, match="memory"):
        plan_batch([10], spec, COST)
    with pytest.raises(ConfigError, match="level"):
        MemoryModel({"all": 1.0}, "none")


@pytest.mark.parametrize(
    "bad",
    [
        {"attention_s": -1},
        {"linear_s": float("nan")},
        {"schedules": ("mesh",)},
        {"schedules": ()},
        {"overlap": 2},
        {"efficiency": ((128, 0.0),)},
        {"efficiency": ((256, 0.5), (128, 0.6))},
    ],
)
def test_bad_cost_models_are_refused(bad) -> None:
    with pytest.raises(ConfigError, match="cost"):
        CostModel(**{"attention_s": 1e-9, "linear_s": 1e-4, "fixed_s": 0.1, "bytes_per_token": 1e6, **bad})


def test_buckets_have_the_least_error() -> None:
    rng = np.random.default_rng(0)
    lengths = np.sort(rng.integers(1, 60, 9))[::-1]
    for q in (1, 2, 3, 4):
        made = bucketize(lengths, q)
        assert sorted(np.concatenate(made.members).tolist()) == list(range(9))
        error = sum(int((lengths[m].max() - lengths[m]).sum()) for m in made.members)
        assert error == made.error_tokens
        up = np.sort(lengths)
        best = min(
            sum(int((part[-1] - part).sum()) for part in np.split(up, cuts))
            for cuts in itertools.combinations(range(1, 9), q - 1)
        )
        assert error == best
    assert bucketize(lengths, 9).error_tokens == 0


def test_division_has_the_least_largest_sum() -> None:
    lengths = np.sort(np.random.default_rng(1).integers(1, 100, 10))[::-1]
    for parts in range(1, 6):
        runs = divide(lengths, parts)
        assert [start for start, _ in runs[1:]] == [stop for _, stop in runs[:-1]] and len(runs) <= parts
        best = min(
            max(int(part.sum()) for part in np.split(lengths, cuts))
            for cuts in itertools.combinations(range(1, 10), parts - 1)
        )
        assert max(int(lengths[a:b].sum()) for a, b in runs) == best
    assert len(divide(np.array([1000, 5, 5, 5, 5]), 3)) == 3


def test_partition_counts_are_the_known_ones() -> None:
    for devices, known in ((32, 202), (64, 1828)):
        use = tuple((1 << p,) for p in reversed(range(devices.bit_length())))
        counts = all_partitions(use, (devices,), 30_000)
        assert len(counts) == known
        assert np.all(counts @ np.array(use)[:, 0] == devices) and len(np.unique(counts, axis=0)) == known
    with pytest.raises(TooManyPartitionsError):
        all_partitions(tuple((d,) for d in range(64, 0, -1)), (64,), 1000)


@pytest.mark.parametrize("seed", range(6))
def test_every_bound_is_below_every_assignment(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = ClusterSpec.uniform(8, 4, 100.0, float(rng.choice([2, 50])), 2000)
    table = BatchTable([int(x) for x in rng.integers(50, 1900, int(rng.integers(3, 9)))], spec, COST)
    problem = table.problem(0, len(table.lengths))
    solved = solve_by_enumeration(problem, spec)
    assert area_bound(problem) <= solved.lower_bound_s * (1 + 1e-6) <= solved.makespan * (1 + 2e-6)
    assert aggregated_bound(problem, area_bound(problem)) <= solved.makespan * (1 + 1e-6)


def test_dual_feasible_weights_never_overfill_a_bin() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        items = rng.dirichlet(np.ones(int(rng.integers(2, 6))) * 2) * rng.choice([1.0, 0.95])
        for weight in dual_feasible(items):
            assert weight.sum() <= 1 + 1e-9


def test_even_shards_are_the_striped_layout() -> None:
    for tokens, members in itertools.product((0, 1, 127, 128, 1000, 1153), (1, 2, 3, 4)):
        owners = block_owners(tokens, (1 / members,) * members, 128)
        layout = SequenceLayout("striped", tokens, members, 128)
        assert shard_lengths(owners, tokens, members, 128) == layout.lengths


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (0.7, 0.1, 0.1, 0.1), (0.25, 0.75)])
def test_uneven_shards_keep_their_share_of_every_prefix(weights) -> None:
    owners = block_owners(128 * 300 - 5, weights, 128)
    for prefix in range(1, 301):
        share = np.bincount(owners[:prefix], minlength=len(weights)) - np.array(weights) * prefix
        assert np.all(np.abs(share) < 1 + 1e-6)
    assert sum(shard_lengths(owners, 128 * 300 - 5, len(weights), 128)) == 128 * 300 - 5


def test_tasks_give_each_rank_the_same_number_of_micro_batches_and_every_token_once() -> None:
    spec = ClusterSpec.uniform(8, 4, 100.0, 5.0, 1024)
    lengths = mix("github").draw(40, 7000, 0)
    plan = plan_batch(lengths, spec, COST, block=128)
    tasks = [rank_tasks(plan, rank) for rank in range(8)]
    assert {len(task) for task in tasks} == {len(plan.micro_batches)}
    held = 0
    for rank, mine in enumerate(tasks):
        for task in mine:
            assert task.is_idle == (task.group is None)
            if task.group is not None:
                assert task.group[task.member] == rank
                assert task.shard_lengths[task.member] <= 1024
                assert sum(task.shard_lengths) == task.num_tokens == sum(lengths[s] for s in task.sequences)
                held += task.shard_lengths[task.member]
    assert held == sum(lengths)
    assert all(len(ranks) > 1 for ranks in all_groups([plan]))
    with pytest.raises(ValueError, match="rank=8"):
        rank_tasks(plan, 8)


def test_idle_ranks_have_a_task_for_every_micro_batch() -> None:
    plan = plan_batch([10], ClusterSpec.uniform(3, 3, 10.0, 1.0, 100), COST, degrees=[1])
    assert [rank_tasks(plan, rank)[0].is_idle for rank in range(3)].count(True) == 2


@pytest.mark.parametrize("name", sorted(MIXES))
def test_mixes_follow_their_histogram(name: str) -> None:
    made = mix(name)
    lengths = np.array(made.draw(40_000, 10**9, 0))
    shares = np.histogram(lengths, bins=np.array(made.edges) + 1e-9)[0] / len(lengths)
    assert np.allclose(shares, np.array(made.shares) / sum(made.shares), atol=0.01)
    assert made.draw(50, 1000, 3) == made.draw(50, 1000, 3) and max(made.draw(50, 1000, 3)) <= 1000
    with pytest.raises(ConfigError, match="cap"):
        made.draw(5, 10, 0)


def test_the_wikipedia_mix_has_the_published_mean() -> None:
    assert np.mean(mix("wikipedia").draw(60_000, 400_000, 0)) == pytest.approx(1014, rel=0.08)


def test_an_unknown_mix_is_named() -> None:
    with pytest.raises(ConfigError, match="wikipedia"):
        mix("books")
