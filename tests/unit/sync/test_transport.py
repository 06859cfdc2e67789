"""Replicas as processes of their own: they meet, stay bit-identical, and survive each other's faults."""

import signal
import time

from unit.sync.conftest import digests_by_round

from ltrain.config.sync import SparseLoCo
from ltrain.metrics.names import is_known
from ltrain.sync.link_planner import LinkPlanner


def _agree(results, rounds):
    seen = digests_by_round(results)
    assert {r for r, _ in seen} >= set(rounds)
    assert all(len(digests) == 1 for digests in seen.values()), seen


def test_two_full_replicas_and_one_of_two_stages(lab):
    lab.serve(3)
    lab.job("full-a", "--rounds", "4")
    lab.job("full-b", "--rounds", "4")
    for stage in (0, 1):
        lab.job("pipe", "--rounds", "4", "--stages", f"stage{stage}", "--rank", str(stage),
                "--num-ranks", "2", name=f"pipe{stage}")  # fmt: skip
    results = lab.results()
    _agree(results, range(1, 5))
    # A quick replica may leave behind the last round, and none before.
    assert results["full-a"][-2]["metrics"]["sync/peers"] == 3
    last = results["full-a"][-1]["metrics"]
    assert last["sync/included"] == 1
    assert last["sync/bytes_up"] > 0 and last["sync/residual_norm"] > 0
    stage_bytes = [results[f"pipe{stage}"][-1]["metrics"]["sync/bytes_up"] for stage in (0, 1)]
    assert sum(stage_bytes) < 1.2 * last["sync/bytes_up"]


def test_a_killed_replica_rejoins_from_its_checkpoint(lab):
    lab.serve(3)
    for name in "abc":
        lab.job(name, "--step-s", "0.05", "--checkpoint", str(lab.folder / name))
    lab.wait_round("c", 2)
    lab.kill("c")
    lab.wait_round("a", 4)
    lab.job("c", "--step-s", "0.05", "--checkpoint", str(lab.folder / "c"))
    assert lab.line("c")["resumed"] >= 2
    first = lab.line("c")["round"]
    lab.wait_round("c", first + 1)
    lab.stop_after(first + 8)
    results = lab.results()
    _agree(results, range(first, first + 9))
    assert first > 3 and results["c"][-1]["metrics"]["sync/peers"] == 3
    assert results["a"][-1]["metrics"]["sync/included"] == 1


def test_kill_at_every_moment_of_a_round(lab):
    """c is killed again and again; the others go on, and c does with the error buffer that it had saved."""
    lab.serve(3)
    saves = ("--step-s", "0.05", "--checkpoint", str(lab.folder / "c"))
    for name in "ab":
        lab.job(name, "--step-s", "0.05")
    lab.job("c", *saves)
    lab.wait_round("c", 1)
    lab.kill("c")
    kept = None
    for moment in ("before-send", "mid-push", "after-announce", "before-apply", "in-checkpoint"):
        now = lab.lines("a")[-1]["round"]
        lab.job("c", *saves, "--die", f"{moment}:{now + 4}")
        resumed, *reports = lab.died("c")
        assert kept is None or resumed["error"] == kept, moment
        kept = reports[-1]["error"] if reports else resumed["error"]
        assert lab.lines("a")[-1]["round"] > now
    lab.job("c", *saves)
    assert lab.line("c")["error"] == kept
    first = lab.line("c")["round"]
    lab.wait_round("c", first + 2)
    lab.stop_after(first + 10)
    results = lab.results()
    _agree(results, range(first, first + 11))
    last = results["c"][-1]["metrics"]
    assert last["sync/peers"] == 3 and last["sync/included"] == 1


def test_a_stalled_replica_is_not_waited_for_and_catches_up(lab):
    lab.serve(3, min_s=0.3, max_s=1.0)
    for name in "abc":
        lab.job(name, "--step-s", "0.05")
    lab.wait_round("c", 1)
    lab.signal("c", signal.SIGSTOP)
    lab.wait_round("a", 5)
    lab.signal("c", signal.SIGCONT)
    # Back in step when it takes part again, in a round that the others count it in.
    while lab.line("c")["metrics"]["sync/included"] != 1 or len(lab.lines("c")) < 3:
        pass
    last = len(lab.lines("a")) + 10
    lab.stop_after(last)
    results = lab.results()
    _agree(results, range(6, last + 1))
    rounds = [report["round"] for report in results["c"]]
    assert rounds[-1] >= last and rounds == sorted(set(rounds)) and len(rounds) < last - 1
    assert results["c"][-1]["metrics"]["sync/included"] == 1


def test_a_late_joiner_gets_the_state(lab):
    lab.serve(2)
    for name in "ab":
        lab.job(name, "--step-s", "0.05", kind="diloco", bits=32)
    lab.wait_round("a", 2)
    lab.job("late", "--step-s", "0.05", kind="diloco", bits=32)
    first = lab.line("late")["round"]
    lab.stop_after(first + 8)
    results = lab.results()
    _agree(results, range(3, first + 9))
    assert first > 2 and results["late"][-1]["metrics"]["sync/peers"] == 3


def test_the_service_may_be_restarted(lab):
    service = lab.serve(2)
    for name in "ab":
        lab.job(name, "--rounds", "8", "--step-s", "0.1")
    lab.wait_round("a", 2)
    service.close()
    time.sleep(0.5)
    lab.serve(2, port=service.address[1])
    _agree(lab.results(), range(3, 9))


def test_a_replica_that_diverged_takes_the_majority_state(lab):
    lab.serve(3)
    # Steps that take their time: the others must still be there while c fetches their state.
    for name in "abc":
        corrupt = ["--corrupt", "2"] if name == "c" else []
        lab.job(name, "--rounds", "10", "--step-s", "0.3", *corrupt)
    results = lab.results()
    seen = digests_by_round(results)
    assert len(seen[3, "stage0"]) == 2 and len(seen[3, "stage1"]) == 1
    assert all(len(digests) == 1 for (round_, _), digests in seen.items() if round_ >= 5), seen


def test_another_configuration_is_refused_with_the_field_on_both_sides(lab):
    lab.serve(2)
    lab.job("a", "--rounds", "3", "--step-s", "0.2")
    time.sleep(1.0)
    for name, options, fields, word in (
        ("other-chunk", [], {"chunk": 1024}, "sync.chunk"),
        ("other-model", ["--model", "bigger"], {}, "model"),
        ("other-ranks", ["--num-ranks", "1", "--rank", "4"], {}, "rank"),
    ):
        lab.job(name, *options, **fields)
        refusal = lab.line(name)["refused"]
        assert word in refusal and "the run has" in refusal
        assert lab.end(name) == 3
    lab.job("b", "--rounds", "3", "--step-s", "0.2")
    _agree(lab.results(), range(1, 4))


def test_a_plan_made_from_measured_links_is_followed_by_all(lab):
    fields = {"adapt": True, "target_round_s": 5.0, "max_steps_per_round": 10, "chunk": 256}
    config = SparseLoCo(steps_per_round=2, density=0.05, bits=1, **fields)
    lab.serve(2, planner=LinkPlanner(config, every=2))
    for name in "ab":
        lab.job(name, "--rounds", "5", **fields)
    results = lab.results()
    _agree(results, range(1, 6))
    plans = [[(r["metrics"]["sync/steps"], r["reason"]) for r in results[name]] for name in "ab"]
    assert plans[0] == plans[1] and "Mbit/s" in plans[0][-1][1]
    assert all(r["metrics"]["sync/bandwidth/b"] > 0 for r in results["a"])
    assert all(is_known(name) for row in results["a"] for name in row["metrics"])
