"""The integer program: slow links get sparser and rarer exchange, and the reasons say so."""

import importlib
import itertools
import math
from pathlib import Path

import pytest
import torch

from ltrain.config.sync import SparseLoCo
from ltrain.sync import compress, progress
from ltrain.sync.adapt import Network, choices_for, frame_bytes, judge, solve
from ltrain.sync.link_planner import LinkPlanner
from ltrain.sync.progress import step_worth

MBIT = 1e6 / 8
ROOT = Path(__file__).parents[3]
CONFIG = SparseLoCo(adapt=True, target_round_s=30.0, steps_per_round=5, bits=1)
PATIENT = CONFIG.model_copy(update={"target_round_s": 600.0})


def _network(up=(500, 500, 500), step_s=0.5, down=None, **more):
    names = "abcdefgh"[: len(up)]
    links = [{n: s * MBIT for n, s in zip(names, rates, strict=True)} for rates in (up, down or up)]
    steps = step_s if isinstance(step_s, dict) else dict.fromkeys(names, step_s)
    return Network(steps, *links, **more)


def _solve(config=CONFIG, entries=200_000_000, **network):
    return solve(config, entries, _network(**network))


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("k", [16, 64, 256])
def test_bytes_are_those_of_the_codec(k, bits):
    x = torch.randn(64 * 4096, generator=torch.Generator().manual_seed(0))
    payload = compress(x, density=k / 4096, bits=32)
    scales = 2 * 64 if bits == 1 else 0
    expected = payload.sections["indices"] + payload.num_values * bits / 8 + scales
    assert frame_bytes(x.numel(), k / 4096, bits, 4096) == pytest.approx(expected, rel=0.02)


def test_a_density_has_the_codec_of_fewer_bytes():
    assert {c.bits for c in choices_for(CONFIG, 10**6)} == {1}
    # In chunks of few values a scale a chunk costs more than a second bit.
    few = CONFIG.model_copy(update={"chunk": 256, "bits": 2})
    assert {c.bits for c in choices_for(few, 10**6)} == {2}
    assert {c.bits for c in choices_for(CONFIG.model_copy(update={"bits": 16}), 10**6)} == {16}


def test_worth_is_what_was_measured(monkeypatch):
    """The constants are those that the tool finds in the recorded runs."""
    monkeypatch.syspath_prepend(ROOT / "tools/bench")
    tool = importlib.import_module("sync_progress_fit")
    worths = tool.read(ROOT / "docs/benchmarks/sync_progress.csv")
    found = tool.fit(worths, 0.5, progress.STARVED_POWER)
    assert found.starved == pytest.approx(progress.STARVED_AT, rel=0.1)
    assert found.drift == pytest.approx(progress.DRIFT_STEPS, rel=0.1)
    assert len(worths) >= 12 and found.error < 0.2
    for worth in worths:
        ours = found.scale * step_worth(worth.steps, 1 / worth.rounds)
        assert ours == pytest.approx(found(worth), abs=0.05)


def test_worth_at_the_neutral_setting_and_in_the_limits():
    assert step_worth(1, 1.0) == pytest.approx(1.0, abs=1e-4)
    dense = [step_worth(h, 1.0) for h in (1, 5, 15, 60, 240)]
    assert dense == sorted(dense, reverse=True)
    # Sparse exchange wants rounds of some length, sparser exchange longer ones.
    best = [max(range(1, 241), key=lambda h: step_worth(h, k / 4096)) for k in (256, 64, 16)]
    assert 1 < best[0] < best[1] < best[2] and 15 <= best[1] <= 30


def test_fast_links_keep_the_density_and_take_the_rounds_that_train_best():
    """Not the shortest: 5 steps a round needed more steps and time than 15 on 500 Mbit/s."""
    small = _solve(PATIENT, entries=470_000, step_s=0.08, own_s=0.03, latency_s=0.005)
    assert {c.density for c in small.choices.values()} == {CONFIG.density}
    assert 15 <= small.steps <= 30
    assert f"with {15 if small.steps == 20 else 20} steps" in small.reason
    # Without sparsity there is nothing to wait for: with free links every step is exchanged.
    dense = PATIENT.model_copy(update={"density": 1.0, "min_density": 0.5, "steps_per_round": 1, "bits": 16})
    assert _solve(dense, entries=1000).steps == 1


def test_slower_links_never_get_shorter_rounds_or_a_denser_exchange():
    free = PATIENT.model_copy(update={"target_round_s": 1e5})
    for step_s, entries in ((0.08, 470_000), (0.5, 200_000_000), (2.0, 8_000_000_000)):
        decisions = [
            _solve(free, entries=entries, step_s=step_s, up=(speed,) * 3, own_s=0.1 * step_s)
            for speed in (500, 50, 10, 1)
        ]
        for fast, slow in itertools.pairwise(decisions):
            assert slow.progress_s <= fast.progress_s
            # Traffic a step falls; longer rounds may buy back some of the density.
            assert _traffic(slow) <= _traffic(fast) * 1.001
        assert decisions[-1].steps >= decisions[0].steps


def _traffic(decision):
    return sum(choice.nbytes for choice in decision.choices.values()) / decision.steps


def test_a_slow_uplink_sends_less_than_the_others():
    mixed = _solve(PATIENT, up=(500, 500, 10), down=(500, 500, 500))
    assert mixed.choices["c"].nbytes < mixed.choices["a"].nbytes == mixed.choices["b"].nbytes
    assert "bound by c (up 10, down 500 Mbit/s)" in mixed.reason
    alone, together = _solve(PATIENT), _solve(PATIENT, up=(500, 500, 2))
    assert _traffic(together) < _traffic(alone) and together.steps >= alone.steps
    densities = [c.density for c in _solve(up=(500, 500, 2)).choices.values()]
    assert max(densities) <= 4 * min(densities)


def test_a_slow_computer_makes_the_exchange_matter_less():
    even = _solve(PATIENT, up=(50,) * 3)
    uneven = _solve(PATIENT, up=(50,) * 3, step_s={"a": 0.5, "b": 0.5, "c": 5.0})
    assert _traffic(uneven) >= _traffic(even) and uneven.round_s >= uneven.steps * 5.0


def test_the_target_is_met_or_the_reason_says_that_it_cannot_be():
    assert _solve(up=(100, 100, 20)).round_s <= 30.0
    hopeless = _solve(up=(0.1, 0.1, 0.1))
    assert hopeless.round_s > 30.0 and "no choice meets target_round_s=30" in hopeless.reason
    assert {c.density for c in hopeless.choices.values()} == {CONFIG.min_density}
    # A sparser exchange would not help where the local steps alone take longer.
    slow = _solve(step_s=10.0)
    assert "no choice meets" in slow.reason and slow.steps == 5
    assert {c.density for c in slow.choices.values()} == {CONFIG.density}


@pytest.mark.parametrize("overlap", ["none", "delayed"])
@pytest.mark.parametrize("target_s", [20.0, 300.0])
def test_it_is_the_best_of_all_choices_that_meet_the_target(target_s, overlap):
    """Brute force over steps and codecs, two replicas."""
    fields = {"target_round_s": target_s, "max_steps_per_round": 30, "min_density": 4 / 4096}
    config = CONFIG.model_copy(update=fields | {"overlap": overlap})
    network = _network(up=(50, 2), step_s=0.5, own_s=0.3, latency_s=0.1)
    best = None
    for steps in (5, 10, 15, 20, 30):
        for pair in itertools.product(choices_for(config, 200_000_000), repeat=2):
            densities = [c.density for c in pair]
            decision = judge(config, network, steps, dict(zip("ab", pair, strict=True)))
            if decision.round_s > target_s or max(densities) > 4.001 * min(densities):
                continue
            if best is None or decision.progress_s > best.progress_s * (1 + 1e-9):
                best = decision
    decision = solve(config, 200_000_000, network)
    assert (decision.steps, decision.choices) == (best.steps, best.choices) and decision.round_s <= target_s


def test_the_time_of_a_round_counts_all_of_it():
    config, choice = CONFIG, choices_for(CONFIG, 10**8)[0]
    network = _network(up=(100, 100), own_s=2.0, latency_s=0.5, step_s={"a": 0.5, "b": 1.0})
    exchange_s = choice.nbytes / (100 * MBIT)
    both = {"a": choice, "b": choice}
    assert judge(config, network, 10, both).round_s == pytest.approx(10 * 1.0 + 2.0 + 0.5 + exchange_s)
    delayed = config.model_copy(update={"overlap": "delayed"})
    assert judge(delayed, network, 10, both).round_s == pytest.approx(max(10.0, 0.5 + exchange_s) + 2.0)


def test_a_costly_exchange_asks_for_more_local_steps():
    config = CONFIG.model_copy(update={"steps_per_round": 1, "target_round_s": 100.0})
    for name in ("own_s", "latency_s"):
        costs = (0.0, 1.0, 5.0)
        steps = [_solve(config, entries=10**7, up=(100, 100), **{name: seconds}).steps for seconds in costs]
        assert steps == sorted(steps) and steps[0] <= 20 and steps[-1] >= 30


def _notes(**more):
    note = {"step_s": 0.5, "entries": 10**8, "round_s": 2.0, "wait_s": 1.5, "frame_bytes": 10**6}
    return {
        r: [note | {"links": {o: 10 * MBIT for o in "ab" if o != r}} | more] for r in "ab"
    }  # fmt: skip


def test_a_planner_needs_every_link_and_a_finished_round_and_survives_bad_notes():
    planner = LinkPlanner(CONFIG, every=1)
    notes = _notes()
    assert planner(_notes(round_s=0.0, wait_s=0.0)) is None
    plan = planner(notes)
    assert plan is not None and set(plan["density"]) == {"a", "b"} and plan["steps"] >= 5
    assert planner({"a": notes["a"], "b": [notes["b"][0] | {"links": {}}]}) is None
    for bad in ({"links": "x"}, notes["b"][0] | {"step_s": math.nan}, notes["b"][0] | {"round_s": "x"}):
        assert planner({"a": notes["a"], "b": [bad]}) is None
    assert planner(notes) is not None
    every_second = LinkPlanner(CONFIG, every=2)
    assert [every_second(notes) is not None for _ in range(5)] == [False, False, True, False, True]


def test_a_planner_tells_the_replicas_own_work_from_waiting():
    """One round with an outlier among five changes nothing; transfers are not counted twice."""
    planner = LinkPlanner(CONFIG.model_copy(update={"target_round_s": 600.0}), every=5)
    transfer_s = 10**6 / (10 * MBIT)
    usual = _notes(wait_s=transfer_s + 0.2, round_s=transfer_s + 0.2 + 0.4)
    outlier = _notes(wait_s=60.0, round_s=90.0, step_s=7.0)
    plans = [planner(notes) for notes in (usual, usual, outlier, usual, usual, usual)]
    assert plans[:5] == [None] * 5
    assert "+ 0.6 s" in plans[5]["reason"]
