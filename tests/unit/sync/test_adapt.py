"""The integer program: slow links get sparser and rarer exchange, and the reasons say so."""

import itertools
import math

import pytest
import torch

from ltrain.config.sync import SparseLoCo
from ltrain.sync import adapt, compress
from ltrain.sync.adapt import LinkPlanner, choices_for, exchange_times, frame_bytes, solve

MBIT = 1e6 / 8
CONFIG = SparseLoCo(adapt=True, target_round_s=30.0, steps_per_round=5, bits=1)


def _solve(config=CONFIG, up=(500, 500, 500), step_s=0.5, entries=200_000_000):
    names = ["a", "b", "c"][: len(up)]
    speeds = {n: s * MBIT for n, s in zip(names, up, strict=True)}
    return solve(
        config,
        entries=entries,
        step_s=dict.fromkeys(names, step_s),
        up_bytes_s=speeds,
        down_bytes_s=speeds,
    )


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("k", [16, 64, 256])
def test_bytes_are_those_of_the_codec(k, bits):
    x = torch.randn(64 * 4096, generator=torch.Generator().manual_seed(0))
    payload = compress(x, density=k / 4096, bits=32)
    scales = 2 * 64 if bits == 1 else 0
    expected = payload.sections["indices"] + payload.num_values * bits / 8 + scales
    assert frame_bytes(x.numel(), k / 4096, bits, 4096) == pytest.approx(expected, rel=0.02)


def test_fast_links_keep_the_density_and_few_steps():
    decision = _solve()
    assert {c.density for c in decision.choices.values()} == {CONFIG.density}
    assert decision.steps == 5 and decision.round_s <= 30.0


def test_a_slow_replica_sends_less_and_the_others_follow_within_a_ratio():
    fast, mixed = _solve(), _solve(up=(500, 500, 2))
    assert mixed.choices["c"].nbytes < fast.choices["c"].nbytes
    densities = [c.density for c in mixed.choices.values()]
    assert max(densities) <= 4 * min(densities)
    assert "bound by c" in mixed.reason and "Mbit/s" in mixed.reason


def test_the_target_is_met_or_the_reason_says_that_it_cannot_be():
    assert _solve(up=(100, 100, 20)).round_s <= 30.0
    hopeless = _solve(up=(0.1, 0.1, 0.1))
    assert hopeless.round_s > 30.0 and "no choice meets target_round_s=30" in hopeless.reason
    assert {c.density for c in hopeless.choices.values()} == {CONFIG.min_density}


def test_it_is_the_best_of_all_choices_that_meet_the_target():
    """Brute force over steps and codecs, two replicas."""
    config = SparseLoCo(adapt=True, target_round_s=20.0, steps_per_round=5, bits=1, max_steps_per_round=30)
    speeds = {"a": 50 * MBIT, "b": 5 * MBIT}
    decision = _solve(config, up=(50, 5))
    best = None
    for steps in (5, 10, 15, 30):
        for pair in itertools.product(choices_for(config, 200_000_000), repeat=2):
            chosen = dict(zip("ab", pair, strict=True))
            exchange_s = max(
                exchange_times({r: c.nbytes for r, c in chosen.items()}, speeds, speeds).values()
            )
            densities = [c.density for c in pair]
            if steps * 0.5 + exchange_s > 20.0 or max(densities) > 4.001 * min(densities):
                continue
            loss = adapt._STEPS_PENALTY * math.log2(steps / 5) + adapt._TIME_PENALTY * exchange_s / (
                steps * 0.5
            )
            loss += sum(adapt._codec_penalty(c, config) / 2 for c in pair)
            if best is None or loss < best[0] - 1e-9:
                best = (loss, steps, chosen)
    assert best is not None
    assert (decision.steps, decision.choices) == best[1:] and decision.round_s <= 20.0


def test_a_planner_needs_every_link_and_survives_bad_notes():
    planner = LinkPlanner(CONFIG, every=1)
    notes = {
        r: [
            {
                "step_s": 0.5,
                "entries": 10**8,
                "round_s": 2.0,
                "frame_bytes": 10**6,
                "links": {o: 10 * MBIT for o in "ab" if o != r},
            }
        ]
        for r in "ab"
    }
    plan = planner(notes)
    assert plan is not None and set(plan["density"]) == {"a", "b"} and plan["steps"] >= 5
    assert planner({"a": notes["a"], "b": [notes["b"][0] | {"links": {}}]}) is None
    assert planner({"a": notes["a"], "b": [{"links": "x"}]}) is None
    assert LinkPlanner(CONFIG, every=2)(notes) is not None


def test_a_costly_exchange_asks_for_more_local_steps():
    config = SparseLoCo(adapt=True, target_round_s=100.0, steps_per_round=1, bits=1)
    speeds = {"a": 100 * MBIT, "b": 100 * MBIT}
    steps = [
        solve(config, entries=10**7, step_s={"a": 0.5, "b": 0.5}, up_bytes_s=speeds, down_bytes_s=speeds,
              fixed_s=fixed).steps
        for fixed in (0.0, 1.0, 5.0)
    ]  # fmt: skip
    assert steps == sorted(steps) and steps[0] <= 2 and steps[-1] >= 15
