"""Who keeps the others waiting, from the ranks' last heartbeats."""

from ltrain.train.watch import laggards


def _beat(**changes):
    state = {"beat": 9, "host": "node1", "pid": 7, "step": 5, "phase": "grad_sync", "for_s": 12.0}
    return {**state, "collectives": 40, "at": "step.py:9 run", "waits": True, **changes}


def test_a_silent_rank_is_named_with_where_it_was():
    states = {0: _beat(), 1: _beat(phase="forward", collectives=39)}
    assert laggards(states, [1], 2) == (
        "rank 1 (process 7 on node1) is silent, dead or stopped: last seen in step 5, "
        "forward for 12 s (at step.py:9 run)"
    )


def test_a_rank_without_any_beat_is_named():
    assert laggards({0: _beat()}, [], 2) == "rank 1 has sent no sign of life"


def test_the_rank_that_does_not_wait_is_the_one_that_lags():
    text = laggards({0: _beat(), 1: _beat(waits=False, collectives=38, phase="data"), 2: _beat()}, [], 3)
    assert text.startswith("rank 1 (process 7 on node1) lags: step 5, data")
    assert text.endswith("2 collectives behind")
    assert "rank 0" not in text and "rank 2" not in text


def test_ranks_that_wait_elsewhere_are_told_apart_by_their_collectives():
    assert "rank 2" in laggards({0: _beat(), 1: _beat(), 2: _beat(collectives=39)}, [], 3)
    assert "link between them" in laggards({0: _beat(), 1: _beat()}, [], 2)
