"""Decisions of the rendezvous service, without sockets or clocks."""

import pytest

from ltrain.sync.coordinator import Coordinator, RankId, WaitPolicy

POLICY = WaitPolicy(1.0, 10.0, 4.0)


def _hello(round_=0, digest="d", fields=None, shards=("s",), num_ranks=1):
    return {
        "num_ranks": num_ranks,
        "host": "h",
        "port": 1,
        "shards": dict.fromkeys(shards, "shapes"),
        "fields": fields or {"model": "m"},
        "round": round_,
        "digests": dict.fromkeys(shards, digest),
    }


def _enter(run, name, **fields):
    return run.hello(RankId(name, 0), _hello(**fields))


def _run(names="abc", policy=POLICY, **fields):
    run = Coordinator(len(names), policy)
    for name in names:
        sends = _enter(run, name, **fields)
    assert {s.to.replica for s in sends if s.kind == "start"} == set(names) and run.round == 0
    return run


def _arrive(run, name, now, round_=None, digest="d"):
    fields = {"round": run.round if round_ is None else round_, "frames": {"s": "sha-" + name},
              "digests": {"s": digest}, "notes": {}}  # fmt: skip
    return run.arrived(RankId(name, 0), fields, now)


def _have(run, receiver, sender, now, sha=None):
    fields = {"round": run.round, "replica": sender, "shard": "s", "sha": sha or "sha-" + sender}
    return run.have(RankId(receiver, 0), fields, now)


def _commit(sends):
    found = [s.fields for s in sends if s.kind == "commit"]
    return found[0] if found else None


def _exchange(run, names, now):
    """All arrive and get everything; returns the record."""
    for name in names:
        _arrive(run, name, now)
    sends = []
    for receiver in names:
        for sender in names:
            if receiver != sender:
                assert not _commit(sends)
                sends = _have(run, receiver, sender, now)
    return _commit(sends)


def test_a_round_closes_when_everyone_holds_everything():
    run = _run()
    record = _exchange(run, "abc", 1.0)
    assert record["round"] == 0 and list(record["included"]) == ["a", "b", "c"]
    assert record["on_time"] == ["a", "b", "c"] and not record["excluded"] and run.round == 1


def test_who_is_late_is_left_out_at_the_deadline_and_goes_on_together():
    run = _run()
    for name in "ab":
        _arrive(run, name, 1.0)
    _have(run, "a", "b", 1.0)
    assert not _commit(_have(run, "b", "a", 1.0))
    assert not _commit(run.check(10.9))
    record = _commit(run.check(11.1))
    assert list(record["included"]) == ["a", "b"] and "c" not in record["on_time"]
    # The next round does not wait for it, until it is back.
    assert _commit_of_two(run)["round"] == 1
    sends = _arrive(run, "c", 12.0, round_=0)
    assert [(s.to.replica, s.kind, s.fields["round"]) for s in sends] == [("c", "go", 2)]
    assert _exchange(run, "abc", 13.0)["on_time"] == ["a", "b", "c"]


def _commit_of_two(run):
    for name in "ab":
        _arrive(run, name, 11.5)
    _have(run, "a", "b", 11.5)
    return _commit(_have(run, "b", "a", 11.5))


def test_the_deadline_follows_the_usual_lateness():
    run = _run()
    for step in range(6):
        at = 100.0 * step
        for name in "ab":
            _arrive(run, name, at)
            for other in "ab":
                if other != name:
                    _have(run, name, other, at)
        _arrive(run, "c", at + 3.0)
        for name in "ab":
            _have(run, name, "c", at + 3.0)
            _have(run, "c", name, at + 3.0)
    wait = POLICY.wait_s(run.lateness)
    assert run.round == 6 and 1.0 <= wait < 10.0
    assert WaitPolicy(1.0, 10.0, 4.0).wait_s(run.lateness.__class__([0.1] * 8)) == 1.0
    assert WaitPolicy(1.0, 10.0, 4.0).wait_s(run.lateness.__class__([50.0] * 8)) == 10.0


def test_a_transfer_that_does_not_come_through_costs_one_replica():
    run = _run()
    for name in "abc":
        _arrive(run, name, 0.0)
    for receiver, sender in ("ab", "ba", "ac", "bc", "ca"):
        _have(run, receiver, sender, 0.0)
    nudges = [s for s in run.check(2.0) if s.kind == "missing"]
    assert [(s.to.replica, s.fields["replica"]) for s in nudges] == [("c", "b")]
    record = _commit(run.check(11.0))
    # b's frame reached only a: b's contribution or c would have to go; b stays in the run either way.
    assert list(record["excluded"]) == ["b"] and record["on_time"] == ["a", "b", "c"]


def test_a_bad_frame_excludes_its_sender_with_the_reason():
    run = _run()
    for name in "abc":
        _arrive(run, name, 0.0)
    for receiver, sender in ("ab", "ba", "ca", "cb"):
        _have(run, receiver, sender, 0.0)
    sends = run.bad(RankId("a", 0), {"round": 0, "replica": "c", "shard": "s", "reason": "digest"}, 0.0)
    record = _commit(sends)
    assert list(record["included"]) == ["a", "b"] and "digest" in record["excluded"]["c"]
    assert record["on_time"] == ["a", "b", "c"]


def test_a_contribution_of_a_dead_replica_counts_if_all_others_hold_it():
    for held in (True, False):
        run = _run()
        for name in "abc":
            _arrive(run, name, 0.0)
        for receiver, sender in ("ab", "ba", "ac", *(["bc"] if held else [])):
            _have(run, receiver, sender, 0.0)
        sends = run.lost(RankId("c", 0))
        record = _commit(sends) or _commit(run.check(11.0))
        assert list(record["included"]) == (["a", "b", "c"] if held else ["a", "b"])
        assert record["on_time"] == ["a", "b"]


def test_a_minority_state_is_named():
    run = _run()
    for name in "abc":
        _arrive(run, name, 0.0, digest="other" if name == "b" else "d")
    sends = []
    for receiver, sender in ("ab", "ac", "ba", "bc", "ca", "cb"):
        sends = _have(run, receiver, sender, 0.0)
    record = _commit(sends)
    assert record["diverged"] == ["b"] and list(record["included"]) == ["a", "c"]


def test_at_the_start_the_newest_and_most_common_state_wins():
    run = Coordinator(3, POLICY)
    _enter(run, "a", round_=7, digest="x")
    _enter(run, "b", round_=5, digest="y")
    starts = {s.to.replica: s.fields for s in _enter(run, "c", round_=7, digest="x") if s.kind == "start"}
    assert {name: (f["round"], f["source"]) for name, f in starts.items()} == {
        "a": (7, None), "b": (7, "a"), "c": (7, None)}  # fmt: skip
    # The one that fetches is not waited for before it is there.
    for name in "ac":
        _arrive(run, name, 0.0)
    _have(run, "a", "c", 0.0)
    assert _commit(_have(run, "c", "a", 0.0))["on_time"] == ["a", "c"]
    assert run.synced(RankId("b", 0))[0].fields["round"] == 8


def test_a_replica_of_two_ranks_goes_on_together():
    run = Coordinator(2, POLICY)
    _enter(run, "full", shards=("s", "t"))
    for rank, shard in enumerate("st"):
        sends = run.hello(RankId("pipe", rank), _hello(shards=(shard,), num_ranks=2))
    assert {s.to for s in sends if s.kind == "start"} == {("full", 0), ("pipe", 0), ("pipe", 1)}
    fields = {"round": 0, "frames": {"s": "1", "t": "2"}, "digests": {}, "notes": {}}
    run.arrived(RankId("full", 0), fields, 0.0)
    run.arrived(RankId("pipe", 0), fields | {"frames": {"s": "3"}}, 0.0)
    record = _commit(run.check(20.0))
    assert list(record["included"]) == ["full"] and record["on_time"] == ["full"]
    # Rank 0 had arrived in round 0, rank 1 comes late: both go on at the open round.
    assert not run.synced(RankId("pipe", 0))
    sends = run.arrived(RankId("pipe", 1), fields | {"frames": {"t": "4"}}, 21.0)
    assert {(s.to, s.fields["round"]) for s in sends} == {(("pipe", 0), 1), (("pipe", 1), 1)}


def test_when_all_that_held_the_state_are_gone_the_others_are_told():
    run = _run("ab")
    _enter(run, "late", round_=0, digest="d")
    run.lost(RankId("a", 0))
    sends = run.lost(RankId("b", 0))
    assert [(s.to.replica, s.kind) for s in sends if s.to] == [("late", "error")] and run.round is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"fields": {"model": "other"}}, "model"),
        ({"fields": {"model": "m", "extra": "1"}}, "extra"),
        ({"num_ranks": 2}, "number of ranks"),
    ],
)
def test_a_difference_is_named(change, field):
    run = _run("ab")
    refusal = run.refusal(RankId("a", 0), _hello(**change))
    assert refusal is not None and refusal[0] == field
    shapes = _hello() | {"shards": {"s": "other"}}
    assert run.refusal(RankId("new", 0), shapes)[0] == "tensors of shard s"
    assert run.refusal(RankId("new", 3), _hello())[0] == "rank"
    assert run.refusal(RankId("new", 0), _hello()) is None
