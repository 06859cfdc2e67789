"""Sparse patterns in the trainer: two steps on two context-parallel ranks equal those on one."""

from pathlib import Path

import numpy as np
from support.distributed import run_ranks
from support.tiny import build, tiny_tree, write_text

SLASH = {
    **{"kind": "vertical_slash", "observed": 8, "window": 16, "sinks": 2, "dense_below": 0},
    **{"vertical_p": 0.2, "slash_p": 0.2, "max_verticals": 4, "max_slashes": 2},
}
PATTERNS = {
    "sliding_window": {"kind": "sliding_window", "window": 24, "sinks": 4},
    "s2": {"kind": "s2", "local_blocks": 1, "stride": 2},
    "vertical_slash": {**SLASH, "verticals": "blocks"},
    "vertical_slash-tokens": {**SLASH, "verticals": "tokens"},
    "block_topk": {"kind": "block_topk", "top_k": 3, "dense_layers": [0]},
    "seer_gate": {"kind": "seer_gate", "top_k": 3, "gate_dim": 8, "target_rows": 3},
    "nsa": {
        **{"kind": "nsa", "top_k": 3, "compress": 8, "window": 24, "local_blocks": 1},
        "initial_gates": [0.5, 0.75, 0.25],
    },
}
NAMES = ("train/loss", "train/grad_norm", "sparse/density", "sparse/pattern_loss")


def _two_steps(rank, world_size, folder):
    from ltrain.metrics.sinks import read_metrics
    from ltrain.train.trainer import Trainer

    outcome = {}
    for name, pattern in PATTERNS.items():
        tree = tiny_tree(
            Path(folder),
            run__name=f"{name}-{world_size}",
            attention={"pattern": pattern},
            data__document_mask=False,
            parallel__context={"degree": world_size, "schedule": "ring", "block": 16},
        )
        run = build(tree)
        trainer = Trainer(run.config, run)
        trainer.one_step()
        trainer.one_step()
        trainer.measure.close()
        if rank == 0:
            records = read_metrics(run.folder / "metrics.jsonl")
            outcome[name] = [[r.get(n, 0.0) for n in NAMES] for r in records], records[-1]
    return outcome


def test_two_ranks_train_as_one(tmp_path):
    write_text(tmp_path / "text")
    one = run_ranks(_two_steps, 1, str(tmp_path))[0]
    two = run_ranks(_two_steps, 2, str(tmp_path))[0]
    for name in PATTERNS:
        np.testing.assert_allclose(two[name][0], one[name][0], rtol=1e-5, err_msg=name)
        assert 0 < one[name][0][0][2] < 1, f"{name} drops nothing"
    for name, (_, record) in two.items():
        # 104 tokens of each of 4 rows, 2 layers, keys and values of 2 x 8 fp32; gradients double it.
        kv = 104 * 4 * 2 * 2 * 2 * 8 * 4
        assert record["comm/bytes_intra_node"] >= 2 * 3 * kv, name
        assert record["comm/bytes_inter_node"] == 0
        assert 0 < record["time/attention_comm_s"] < record["perf/step_time_s"]
        assert 0 < record["time/attention_s"] < record["perf/step_time_s"]
        assert 1 <= record["balance/work_max_over_mean"] <= record["balance/exchange_step_max_over_mean"] < 2
