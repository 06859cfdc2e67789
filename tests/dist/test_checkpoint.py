"""Checkpoints over real ranks: bitwise resume, other layouts, damage."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.distributed import run_ranks
from support.tiny import build, parameter_hash, tiny_tree, write_text


def _train(tree, until=None):
    from ltrain.train.main import restore
    from ltrain.train.trainer import Trainer

    run = build(tree)
    restore(run.config, run)
    start = run.step
    trainer = Trainer(run.config, run)
    if until is not None:
        while run.step < until:
            trainer.one_step()
        trainer.save(wait=True)
        trainer.measure.close()
    else:
        trainer.train()
    return start, run


def _losses(folder):
    from ltrain.metrics.sinks import read_metrics

    records = read_metrics(folder / "metrics.jsonl")
    return {r["step"]: (r["train/loss"], r["train/grad_norm"], r["train/lr"]) for r in records}


def _resume(rank, world_size, folder, overrides):
    """An unbroken run, and one that is stopped after 3 steps and built anew; hashes, and losses by step."""
    folder = Path(folder)
    whole = tiny_tree(folder, run__name="whole", **overrides)
    _, run = _train(whole)
    broken = tiny_tree(folder, run__name="broken", **overrides)
    _train(broken, until=3)
    start, again = _train(broken)
    losses = [_losses(folder / "outputs" / name) for name in ("whole", "broken")] if rank == 0 else None
    return start, parameter_hash(run.model), parameter_hash(again.model), losses


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"train__dtype": "bf16", "optimizer__distributed": False, "parallel__tensor": 2},
        {"train__dtype": "bf16", "parallel__context": {"degree": 2, "schedule": "ring", "block": 16}},
        {"parallel__pipeline": 2, "optimizer__distributed": False, "checkpoint__asynchronous": True},
    ],
    ids=["dp2-fp32-zero", "tp2-bf16", "cp2-bf16-zero", "pp2-async"],
)
def test_a_resumed_run_is_bitwise_the_unbroken_one(tmp_path, overrides):
    write_text(tmp_path / "text")
    results = run_ranks(_resume, 2, str(tmp_path), overrides)
    for start, whole, again, _ in results:
        assert start == 3
        assert whole == again
    unbroken, resumed = results[0][3]
    assert sorted(resumed) == [1, 2, 3, 4, 5, 6]
    assert unbroken == resumed


def _part(rank, world_size, folder, overrides, until):
    start, run = _train(tiny_tree(Path(folder), **overrides), until=until)
    return start, (_losses(Path(folder) / "outputs" / "tiny") if rank == 0 else None)


_LAYOUTS = [
    {"parallel__tensor": 2},
    {"parallel__pipeline": 2},
    {"parallel__context": {"degree": 2, "schedule": "ring", "block": 16}},
    {},
]


def test_another_layout_continues_the_same_curve(tmp_path):
    write_text(tmp_path / "text")
    unbroken = run_ranks(_part, 1, str(tmp_path / "one"), {**_text(tmp_path)}, 5)[0][1]
    assert sorted(unbroken) == [1, 2, 3, 4, 5]
    folder = tmp_path / "many"
    for i, overrides in enumerate(_LAYOUTS):
        start, losses = run_ranks(_part, 2, str(folder), {**_text(tmp_path), **overrides}, i + 2)[0]
        assert start == (0 if i == 0 else i + 1)
    for step in unbroken:
        np.testing.assert_allclose(losses[step][0], unbroken[step][0], rtol=2e-6)


def _text(tmp_path):
    return {"data__sources": [{"kind": "text_tree", "path": str(tmp_path / "text")}]}


def _damage(rank, world_size, folder):
    import torch.distributed as dist

    folder = Path(folder)
    tree = tiny_tree(folder, checkpoint__keep=3)
    for until in (1, 2, 3):
        _, run = _train(tree, until=until)
    root = folder / "outputs" / "tiny" / "checkpoints"
    dist.barrier()
    if rank == 0:
        flipped = root / "step-00000003" / "rank-00001.safetensors"
        data = bytearray(flipped.read_bytes())
        data[len(data) // 2] ^= 1
        flipped.write_bytes(data)
        (root / "step-00000002" / "COMPLETE").unlink()
    dist.barrier()
    start, _ = _train(tree, until=2)
    return start, sorted(p.name.rsplit("-", 1)[0] for p in root.iterdir() if rank == 0)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path):
    write_text(tmp_path / "text")
    (start, entries), (other, _) = run_ranks(_damage, 2, str(tmp_path))
    assert start == other == 1
    assert "damaged-step-00000003" in entries


def _full_disk(rank, world_size, folder):
    import ltrain.train.checkpoint.folder as files

    tree = tiny_tree(Path(folder))
    _, run = _train(tree, until=1)
    write, files.write_json = files.write_json, _no_space
    try:
        _, run = _train(tree, until=2)
    finally:
        files.write_json = write
    start, _ = _train(tree, until=1)
    left = [p.name for p in (Path(folder) / "outputs/tiny/checkpoints").iterdir()]
    return run.checkpoints.failure, start, left


def _no_space(path, value):
    if path.name == "rank-00001.json":
        raise OSError(28, "No space left on device")
    path.write_text(json.dumps(value))


def test_a_full_disk_on_one_rank_leaves_the_older_checkpoint(tmp_path):
    write_text(tmp_path / "text")
    for failure, start, left in run_ranks(_full_disk, 2, str(tmp_path)):
        assert failure == "rank 1: the disk is full (ENOSPC)"
        assert start == 1
        assert left == ["step-00000001"]
