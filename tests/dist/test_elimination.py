"""Token elimination on several ranks: the same blocks, losses and gradients as on one."""

from pathlib import Path

import numpy as np
from support.distributed import run_ranks
from support.tiny import build, tiny_tree, write_text

BLOCKS = {"kind": "blocks", "ratio": 0.4, "strata": 8, "sink_blocks": 1, "local_blocks": 0, "block": 8}
CASES = {
    "qkv": {},
    "tokens": {"scorer": {"kind": "pooled", "pool": "tokens"}},
    "q": {"mode": "q"},
    "layer": {"mode": "layer", "scorer": {"kind": "random"}},
    "backward": {"mode": "backward", "scorer": {"kind": "recency"}},
    # At memory.level full.
    "full": {"scorer": {"kind": "random"}},
    "full backward": {"mode": "backward", "scorer": {"kind": "random"}},
}
# Rows of one document with room for strata, of many, and one whose length is not a multiple of the block.
ROWS = {"whole": (False, 416), "packed": (True, 412)}
LAYOUTS = {
    "1": {},
    "context 2": {"context": {"degree": 2}},
    "zigzag 2": {"context": {"degree": 2, "layout": "zigzag"}},
    "tensor 2": {"tensor": 2},
    "pipeline 2": {"pipeline": 2},
    "context 4": {"context": {"degree": 4}},
    "context 2, tensor 2": {"context": {"degree": 2}, "tensor": 2},
}


def _steps(rank, world_size, folder, layouts, rows, cases):
    from ltrain.train.trainer import Trainer

    outcome = {}
    for layout in layouts:
        parallel = dict(LAYOUTS[layout])
        parallel["context"] = {"schedule": "ring", "block": 16} | parallel.get("context", {})
        for name in rows:
            mask, seq_len = ROWS[name]
            for case in cases:
                tree = tiny_tree(
                    Path(folder),
                    run__name=f"{case}-{name}-{layout}".replace(" ", "-").replace(",", ""),
                    elimination=BLOCKS | CASES[case],
                    memory__level="full" if case.startswith("full") else "none",
                    data__document_mask=mask,
                    train__seq_len=seq_len,
                    train__tokens_per_step=2 * seq_len,
                    parallel=parallel,
                )
                run = build(tree)
                trainer = Trainer(run.config, run)
                kept = []
                original = run.elimination._choose

                def watch(layer, inputs, original=original, kept=kept):
                    choice = original(layer, inputs)
                    kept.append((layer, choice.blocks.tolist()))
                    return choice

                run.elimination._choose = watch
                trainer.one_step()
                trainer.one_step()
                trainer.measure.close()
                norms = [float(p.detach().norm()) for p in run.model.parameters()]
                outcome[layout, name, case] = (trainer_records(run), kept, norms)
    return outcome


def trainer_records(run):
    from ltrain.metrics.sinks import read_metrics

    records = read_metrics(run.folder / "metrics.jsonl")
    names = ("train/loss", "train/grad_norm", "elim/kept_frac", "elim/captured_mass")
    return [[r[n] for n in names] for r in records if "train/loss" in r]


def test_every_layout_trains_as_one_rank(tmp_path):
    write_text(tmp_path / "text")
    one = run_ranks(_steps, 1, str(tmp_path), ["1"], ["whole", "packed"], list(CASES))[0]
    two_rows = ["whole", "packed"]
    runs = [
        (2, ["context 2"], two_rows, list(CASES)),
        (2, ["tensor 2", "pipeline 2"], two_rows, ["qkv", "layer", "full", "full backward"]),
        (4, ["context 4", "context 2, tensor 2"], two_rows, ["qkv"]),
    ]
    for world, layouts, rows, cases in runs:
        found = run_ranks(_steps, world, str(tmp_path), layouts, rows, cases)
        for key, (records, _, _) in found[0].items():
            expected, kept, _ = one["1", key[1], key[2]]
            np.testing.assert_allclose(records, expected, rtol=1e-5, err_msg=str(key))
            # Stages of a pipeline hold different layers.
            ranks = [set(map(str, rank[key][1])) for rank in found]
            assert set().union(*ranks) == set(map(str, kept)), key
            if "pipeline" not in key[0]:
                assert all(rank == ranks[0] for rank in ranks), key
    for (_, name, case), (records, _, _) in one.items():
        assert 0 < records[0][2] < 1, (name, case)


def test_contiguous_strata_of_a_zigzag_layout(tmp_path):
    write_text(tmp_path / "text")
    found = run_ranks(_steps, 2, str(tmp_path), ["zigzag 2"], ["whole"], ["qkv"])
    blocks = dict(found[0]["zigzag 2", "whole", "qkv"][1])
    assert found[0]["zigzag 2", "whole", "qkv"][1] == found[1]["zigzag 2", "whole", "qkv"][1]
    for kept in blocks.values():
        counts = np.bincount(np.asarray(kept) // 2 * 8 // 26, minlength=8)
        assert counts.max() - counts.min() <= 1
