"""Plans: what must hold for any of them, against brute force where that is possible."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ltrain.config.base import ConfigError
from ltrain.planner import ClusterSpec, CostModel, Plan, certify, plan_batch
from ltrain.planner.baselines import balanced_squares_s, batch_adaptive_plan, greedy_plan, static_plan
from ltrain.planner.evaluate import evaluate, group_seconds
from ltrain.planner.mixes import MIXES, mix
from ltrain.planner.problem import BatchTable
from ltrain.planner.published import MODELS, cluster

COST = CostModel(5e-9, 1.8e-4, 0.6, 2e6, schedules=("ulysses",))


def small(num_devices: int = 8, per_node: int = 4, tokens: int = 1000) -> ClusterSpec:
    return ClusterSpec.uniform(num_devices, per_node, 100.0, 5.0, tokens)


def check(plan: Plan, lengths: list[int], spec: ClusterSpec) -> None:
    plan.validate(lengths)
    placed = sorted(s for groups in plan.micro_batches for group in groups for s in group.sequences)
    assert placed == list(range(len(lengths)))
    for groups in plan.micro_batches:
        ranks = [rank for group in groups for rank in group.ranks]
        assert len(ranks) == len(set(ranks))
        for group in groups:
            assert sum(lengths[s] for s in group.sequences) == group.num_tokens <= group.capacity
            for rank, weight in zip(group.ranks, group.weights, strict=True):
                node = next(
                    n
                    for n, last in zip(
                        spec.nodes, itertools.accumulate(n.num_devices for n in spec.nodes), strict=True
                    )
                    if rank < last
                )
                assert group.num_tokens * weight <= node.tokens_per_device + 1e-6
    assert plan.predicted_s == pytest.approx(
        sum(max(group.predicted_s for group in groups) for groups in plan.micro_batches)
    )
    assert 0 < plan.step_bound_s <= plan.lower_bound_s * (1 + 1e-9)
    assert plan.lower_bound_s <= plan.predicted_s * (1 + 1e-9)


@pytest.mark.parametrize(
    ("solver", "seed"), [("auto", 0), ("enumerate", 1), ("enumerate", 2), ("enumerate", 3), ("lp", 4)]
)
def test_any_plan_is_complete_and_fits(solver: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = small(int(rng.choice([1, 3, 8, 12])), 4, 1000)
    longest = 1000 * (1 << (spec.num_devices.bit_length() - 1))
    lengths = [int(x) for x in np.minimum(rng.lognormal(5.5, 1.2, 40).astype(int) + 1, longest)]
    check(plan_batch(lengths, spec, COST, solver=solver, trials=2), lengths, spec)


@pytest.mark.parametrize("name", sorted(MIXES))
def test_published_mixes_are_near_their_bound_and_never_worse_than_the_rivals(name: str) -> None:
    model = MODELS["7B"]
    spec, cost = cluster(model, 393_216), model.cost()
    lengths = mix(name).draw(200, 100_000, 1)
    plan = plan_batch(lengths, spec, cost)
    check(plan, lengths, spec)
    assert certify(plan, spec, cost).gap < 0.03
    for rival in (
        greedy_plan(lengths, spec, cost),
        batch_adaptive_plan(lengths, spec, cost),
        static_plan(lengths, spec, cost, 64),
    ):
        check(rival, lengths, spec)
        assert plan.predicted_s <= rival.predicted_s * (1 + 1e-9)


def brute_force(lengths: list[int], spec: ClusterSpec, cost: CostModel) -> float:
    """The least makespan of one micro-batch: all set partitions of the sequences, all degrees per part."""
    table = BatchTable(lengths, spec, cost)
    best = math.inf

    def parts(items: list[int]) -> list[list[list[int]]]:
        if not items:
            return [[]]
        first, rest = items[0], items[1:]
        made = []
        for smaller in parts(rest):
            made.append([[first], *smaller])
            for i in range(len(smaller)):
                made.append([*smaller[:i], [first, *smaller[i]], *smaller[i + 1 :]])
        return made

    for partition in parts(list(range(len(lengths)))):
        options = []
        for part in partition:
            tokens = int(table.lengths[part].sum())
            options.append(
                [
                    (k.degree, table.best_schedule(k, np.array(part))[1])
                    for k in table.kinds
                    if k.capacity >= tokens
                ]
            )
        for choice in itertools.product(*options):
            if sum(degree for degree, _ in choice) <= spec.num_devices:
                best = min(best, max(time for _, time in choice))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_tiny_batches_are_solved_to_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spec = small(4, 2, 1000)
    lengths = [int(x) for x in rng.integers(20, 900, 5)]
    optimum = brute_force(lengths, spec, COST)
    enumerated = plan_batch(lengths, spec, COST, trials=1)
    if len(enumerated.micro_batches) == 1:
        assert enumerated.predicted_s <= optimum * 1.01
        assert enumerated.lower_bound_s <= optimum * (1 + 1e-6)
        exact = plan_batch(lengths, spec, COST, solver="milp", trials=1)
        assert exact.predicted_s == pytest.approx(optimum, rel=1e-3)
        assert exact.lower_bound_s <= optimum * (1 + 1e-6)
        assert certify(enumerated, spec, COST, exact_limit_s=5).lower_bound_s <= optimum * (1 + 1e-6)


def test_solvers_agree_and_no_bound_passes_another_solvers_plan() -> None:
    lengths = [int(x) for x in np.random.default_rng(5).integers(50, 1500, 14)]
    spec = small()
    plans = [
        plan_batch(lengths, spec, COST, solver=solver, time_limit_s=limit, trials=1)
        for solver, limit in (("enumerate", None), ("lp", None), ("milp", 2.0), ("auto", 1.0))
    ]
    best = min(plan.predicted_s for plan in plans)
    for plan in plans:
        check(plan, lengths, spec)
        assert plan.predicted_s <= best * 1.03
        assert plan.lower_bound_s <= best * (1 + 1e-6)


def test_equal_input_gives_equal_text_and_the_text_gives_the_plan_back() -> None:
    lengths = mix("wikipedia").draw(60, 7000, 3)
    first, second = (plan_batch(lengths, small(), COST) for _ in range(2))
    assert first.to_json() == second.to_json() and first.digest == second.digest
    again = Plan.from_json(first.to_json())
    assert again == first and again.solve_s == 0.0


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t[:-5],
        lambda t: "[]",
        lambda t: t.replace('"schema":1', '"schema":9'),
        lambda t: t.replace('"ranks":[0', '"ranks":[77'),
        lambda t: t.replace('"sequences":[', '"sequences":[0,', 1),
    ],
)
def test_damaged_plans_are_refused(damage) -> None:
    text = plan_batch([100, 300, 700], small(), COST).to_json()
    assert damage(text) != text
    with pytest.raises(ConfigError, match="plan"):
        Plan.from_json(damage(text))


def test_a_sequence_that_fits_nowhere_is_named_with_what_would_fit() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_batch([100, 8001, 5], small(), COST)
    assert "lengths[1]=8001" in str(caught.value) and "8000 tokens" in str(caught.value)


@pytest.mark.parametrize(
    ("lengths", "options", "match"),
    [
        ([], {}, "at least one"),
        ([5, 0], {}, "1 or more"),
        ([5], {"solver": "magic"}, "solver"),
        ([5], {"time_limit_s": 0}, "time_limit_s"),
        ([5], {"degrees": []}, "degrees"),
        ([5], {"trials": 0}, "trials"),
    ],
)
def test_bad_input_is_named(lengths: list[int], options: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        plan_batch(lengths, small(), COST, **options)


def test_any_degree_uses_what_powers_of_two_waste() -> None:
    spec = ClusterSpec.uniform(6, 6, 100.0, 5.0, 1000)
    cost = CostModel(5e-9, 1.8e-4, 0.0, 2e6, schedules=("ulysses",))
    lengths = [3000, 3000]
    both = plan_batch(lengths, spec, cost, degrees="any")
    assert [group.degree for group in both.micro_batches[0]] == [3, 3]
    assert both.predicted_s < plan_batch(lengths, spec, cost).predicted_s
    check(both, lengths, spec)


def test_a_group_within_a_node_never_crosses_nodes() -> None:
    spec = ClusterSpec.uniform(16, 8, 100.0, 5.0, 1000)
    lengths = [4500] * 3 + [2500] * 2
    plan = plan_batch(lengths, spec, COST, degrees="any")
    check(plan, lengths, spec)
    for groups in plan.micro_batches:
        for group in groups:
            if group.degree <= 8:
                assert len({rank // 8 for rank in group.ranks}) == 1


def test_more_devices_than_partitions_can_be_listed_for() -> None:
    spec = ClusterSpec.uniform(160, 8, 100.0, 5.0, 1000)
    lengths = mix("commoncrawl").draw(150, 120_000, 0)
    plan = plan_batch(lengths, spec, COST, trials=1)
    check(plan, lengths, spec)
    assert plan.gap < 0.08
    assert plan.to_json() == plan_batch(lengths, spec, COST, trials=1).to_json()


def test_evaluation_under_the_same_model_gives_the_prediction() -> None:
    lengths = mix("github").draw(80, 7000, 2)
    plan = plan_batch(lengths, small(), COST)
    assert evaluate(plan, small(), COST) == pytest.approx(plan.predicted_s)
    slower = COST.scaled(1, 2, 1, 1)
    assert evaluate(plan, small(), slower) > plan.predicted_s
    for group in plan.micro_batches[0]:
        assert group_seconds(group, lengths, small(), COST).total == pytest.approx(group.predicted_s)


def test_balanced_squares_needs_at_least_the_area() -> None:
    lengths = mix("github").draw(80, 7000, 2)
    plan = plan_batch(lengths, small(), COST)
    area = plan.step_bound_s - COST.fixed_s * len(plan.micro_batches)
    assert balanced_squares_s(lengths, small(), COST) > area
