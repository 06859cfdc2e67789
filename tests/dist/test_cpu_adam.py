"""DeepSpeed's CPU Adam steps as torch's AdamW does, or says why it cannot be had."""

from pathlib import Path

import numpy as np
import pytest
from support.distributed import run_ranks
from support.tiny import build, tiny_tree, write_text

from ltrain.config.base import ConfigError


def _losses(rank, world_size, folder):
    from ltrain.metrics.sinks import read_metrics
    from ltrain.train.trainer import Trainer

    losses = {}
    for kind in ("adamw", "cpu_adam"):
        optimizer = {"kind": kind, "lr": 0.01, "weight_decay": 0.1}
        try:
            run = build(tiny_tree(Path(folder), run__name=kind, optimizer=optimizer))
        except ConfigError as error:
            return str(error)
        trainer = Trainer(run.config, run)
        for _ in range(4):
            trainer.one_step()
        trainer.save(wait=True)
        trainer.measure.close()
        if rank == 0:
            losses[kind] = [r["train/loss"] for r in read_metrics(run.folder / "metrics.jsonl")]
    return losses


def test_cpu_adam_equals_adamw(tmp_path):
    write_text(tmp_path / "text")
    losses = run_ranks(_losses, 2, str(tmp_path))[0]
    if isinstance(losses, str):
        assert "optimizer.kind='cpu_adam' needs DeepSpeed's CPU Adam" in losses
        pytest.skip(losses)
    np.testing.assert_allclose(losses["cpu_adam"], losses["adamw"], rtol=1e-6)
    assert losses["adamw"][0] > losses["adamw"][-1]
