import numpy as np
import pytest

from ltrain.metrics.straggler import Straggler


def _feed(straggler, factors, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [straggler.add([f * rng.normal(1, 0.05) for f in factors]) for _ in range(steps)]


@pytest.mark.parametrize("slow", [1.6, 3.0])
def test_a_slow_rank_is_named_after_three_windows_and_cleared_when_it_recovers(slow):
    straggler = Straggler()
    changed = _feed(straggler, [1.0, slow, 1.0, 1.0], 60)
    assert [i for i, c in enumerate(changed) if c] == [59] and straggler.rank == 1
    assert sum(_feed(straggler, [1.0] * 4, 20)) == 1 and straggler.rank == -1


def test_equal_ranks_and_single_slow_steps_name_nobody():
    straggler = Straggler()
    _feed(straggler, [1.0] * 4, 200)
    for step in range(200):
        straggler.add([1.0, 30.0 if step % 5 == 0 else 1.0])
    assert straggler.rank == -1


def test_another_slow_rank_each_window_names_nobody():
    straggler = Straggler()
    for window in range(6):
        _feed(straggler, [2.0 if r == window % 2 else 1.0 for r in range(2)], 20)
    assert straggler.rank == -1
