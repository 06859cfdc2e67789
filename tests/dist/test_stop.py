"""Stopping on request, and steps whose gradient is not finite, over two ranks."""

import os
import signal
from pathlib import Path

import pytest
from support.distributed import run_ranks
from support.tiny import build, parameter_hash, tiny_tree, write_text


def _stopped(rank, world_size, folder):
    from ltrain.train.main import restore
    from ltrain.train.trainer import Trainer

    folder = Path(folder)
    whole = build(tiny_tree(folder, run__name="whole"))
    assert Trainer(whole.config, whole).train() == 0
    tree = tiny_tree(folder, run__name="stopped", run__stop_marker=str(folder / "marker"))
    run = build(tree)
    trainer = Trainer(run.config, run)
    step = trainer.one_step

    def one_step():
        step()
        if run.step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    trainer.one_step = one_step
    code, stopped_at = trainer.train(), run.step
    again = build(tree)
    restore(again.config, again)
    resumed_at = again.step
    final = Trainer(again.config, again).train()
    marker = (folder / "marker").read_text().strip()
    return (
        code,
        stopped_at,
        resumed_at,
        final,
        marker,
        parameter_hash(again.model) == parameter_hash(whole.model),
    )


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_nothing_is_lost(tmp_path):
    write_text(tmp_path / "text")
    for outcome in run_ranks(_stopped, 2, str(tmp_path)):
        assert outcome == (75, 2, 2, 0, "2", True)


def _not_finite(rank, world_size, folder, limit):
    import torch

    from ltrain.train.trainer import NonFinite, Trainer

    run = build(tiny_tree(Path(folder), train__nonfinite_limit=limit))
    trainer = Trainer(run.config, run)
    trainer.one_step()
    before = parameter_hash(run.model)
    weight = next(p for p in run.model.parameters() if p.requires_grad)
    hook = weight.register_hook(lambda grad: grad * float("nan") if rank == 1 else grad)
    stopped = False
    try:
        trainer.one_step()
    except NonFinite:
        stopped = True
    skipped = parameter_hash(run.model) == before
    hook.remove()
    trainer.one_step()
    went_on = parameter_hash(run.model) != before and all(
        torch.isfinite(p).all() for p in run.model.parameters()
    )
    trainer.measure.close()
    return stopped, skipped, run.skipped_steps, went_on, parameter_hash(run.model)


@pytest.mark.parametrize("limit", [1, 2])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path, limit):
    write_text(tmp_path / "text")
    first, second = run_ranks(_not_finite, 2, str(tmp_path), limit)
    assert first[:4] == second[:4] == (limit == 1, True, 1, True)
    assert first[4] == second[4]
