"""A step under any plan is the static step: loss and every gradient; with evaluation and resuming."""

import json
from pathlib import Path
from unittest import mock

import numpy as np
from support.distributed import run_ranks
from support.tiny import build, parameter_hash, tiny_tree, write_text

COST = {"kind": "given", "attention_s": 1e-9, "linear_s": 1e-6, "fixed_s": 1e-3, "bytes_per_token": 1e4}
PLANNED = {
    "parallel__context": {"block": 16},
    "parallel__assignment": {
        "kind": "planned",
        "cluster": {"kind": "uniform", "tokens_per_device": 4096},
        "cost": COST,
    },
}
# Members of each group, a list a micro-batch; weights where they are uneven; ranks that stand nowhere idle.
SHAPES = {
    4: {
        "1+1+2": [[(0,), (1,), (2, 3)]],
        "1+3": [[(0, 1, 2), (3,)]],
        "2+2": [[(0, 1), (2, 3)], [(0, 2), (1, 3)]],
        "4, then 1": [[(0, 1, 2, 3)], [(2,)]],
        "uneven": [[(0, 1, 2), (3,)], [(1, 2)]],
        "shortest on 4": [[(0, 1, 2, 3)], [(0, 1), (2,), (3,)]],
    },
    2: {
        "1+1": [[(0,), (1,)]],
        "2, then 1": [[(0, 1)], [(1,)], [(0, 1)]],
        "shortest on 2": [[(0, 1)], [(0,), (1,)]],
    },
}
UNEVEN = {(0, 1, 2): (0.5, 0.375, 0.125), (1, 2): (0.25, 0.75)}


def _plan(lengths, shape, schedule, uneven=False, alone=None):
    """Sequences dealt round robin over all groups of all micro-batches; `alone` is the first group's only
    one."""
    from ltrain.planner.plan import Group, Plan

    count = sum(len(groups) for groups in shape)
    batches, g = [], 0
    for groups in shape:
        made = []
        for ranks in groups:
            sequences = tuple(range(g, len(lengths), count))
            if alone is not None:
                rest = [s for s in range(len(lengths)) if s != alone]
                sequences = tuple(rest[g - 1 :: count - 1]) if g else (alone,)
            tokens = sum(lengths[s] for s in sequences)
            weights = UNEVEN[ranks] if uneven and ranks in UNEVEN else (1 / len(ranks),) * len(ranks)
            how = "local" if len(ranks) == 1 else "ring" if uneven or len(ranks) == 3 else schedule
            made.append(Group(ranks, sequences, 1.0, how, tokens, tokens, weights))
            g += 1
        batches.append(tuple(made))
    world = 1 + max(rank for groups in shape for ranks in groups for rank in ranks)
    return Plan(tuple(batches), 1.0, 1.0, 1.0, tuple(lengths), max(world, 2 if world < 3 else 4), "test")


def _build(folder, double, **overrides):
    import torch

    from ltrain.train import build as module

    real = module.build_model

    def in_double(*args, **options):
        return real(*args, **{**options, "dtype": torch.float64})

    overrides = {"optimizer__distributed": False, "train__z_loss": 1e-3, **overrides}
    tree = tiny_tree(Path(folder), **overrides)
    with mock.patch.object(module, "build_model", in_double if double else real):
        return build(tree)


def _step(run, batches):
    from ltrain.train.checkpoint.pieces import pieces
    from ltrain.train.step import reduce_totals, run_model

    run.ddp.zero_grad_buffer()
    result = reduce_totals(run_model(run.ddp, run.mesh, batches, train=True), run.mesh)
    by_pointer = {p.data_ptr(): p for p in run.model.parameters()}
    grads = {}
    for piece in pieces(run.model, None, run.mesh):
        grad = by_pointer[piece.tensor.data_ptr()].main_grad
        grads[piece.place.name, piece.place.start] = grad.detach().numpy().copy()
    return result.loss, result.num_targets, grads


LAYOUTS = {
    "fp64": (True, {}),
    "fp32": (False, {}),
    "tp2-fp64": (True, {"parallel__tensor": 2}),
    "pp2-fp64": (True, {"parallel__pipeline": 2}),
}


def _shapes(rank, world_size, folder):
    return {name: _layout(folder, *layout) for name, layout in LAYOUTS.items()}


def _layout(folder, double, layout):
    """Loss and gradients of the static step and of every plan, on one layout."""
    run = _build(folder, double, run__name="static", **layout)
    rows = run.loader.next_step().rows
    outcomes = {"static": _step(run, run.assignment.batches(rows))}
    planned = {**PLANNED, **layout}
    run = _build(folder, double, run__name="planned", **planned)
    lengths = [part.num_tokens for row in rows for part in row.parts()]
    assert len(lengths) > 8 and min(lengths) < 16 < max(lengths)
    pool = run.mesh.data_context.size
    for i, (name, shape) in enumerate(SHAPES[pool].items()):
        # A document of less than a block leaves members of its group without a token.
        alone = lengths.index(min(lengths)) if name.startswith("shortest") else None
        plan = _plan(lengths, shape, ("ring", "ulysses")[i % 2], name == "uneven", alone)
        outcomes[name] = _step(run, run.assignment.carry_out(plan, rows))
    # The planner's own plan, where the longest document fits no single rank.
    section = {**PLANNED["parallel__assignment"], "cluster": {"kind": "uniform", "tokens_per_device": 112}}
    run = _build(folder, double, run__name="own", **{**planned, "parallel__assignment": section})
    assert max(lengths) > 112
    outcomes["own"] = _step(run, run.assignment.batches(rows))
    assert max(g.degree for groups in run.assignment.last.micro_batches for g in groups) > 1
    run.assignment.close()
    return outcomes


def test_a_step_under_any_plan_is_the_static_step(tmp_path):
    write_text(tmp_path / "text")
    for by_layout in run_ranks(_shapes, 4, str(tmp_path)):
        for layout, outcomes in by_layout.items():
            tolerance = 1e-6 if LAYOUTS[layout][0] else 1e-5
            loss, targets, grads = outcomes.pop("static")
            for name, (have_loss, have_targets, have) in outcomes.items():
                assert have_targets == targets, (layout, name)
                np.testing.assert_allclose(have_loss, loss, rtol=tolerance, err_msg=f"{layout} {name}")
                assert have.keys() == grads.keys()
                for parameter, want in grads.items():
                    error = np.linalg.norm(have[parameter] - want) / np.linalg.norm(want)
                    assert error < tolerance, f"{layout} {name}: {parameter} differs by {error:.1e}"


def _train(tree, until=None):
    from ltrain.train.main import restore
    from ltrain.train.trainer import Trainer

    run = build(tree)
    restore(run.config, run)
    start, trainer = run.step, Trainer(run.config, run)
    if until is None:
        trainer.train()
    else:
        while run.step < until:
            trainer.one_step()
        trainer.save(wait=True)
        trainer.measure.close()
        run.assignment.close()
    return start, run


def _records(folder, name):
    from ltrain.metrics.sinks import read_metrics

    return read_metrics(folder / "outputs" / name / "metrics.jsonl")


def _runs(rank, world_size, folder):
    """Static, planned, planned in two parts; then measured and calibrated, in two parts."""
    folder = Path(folder)
    held_out = {"data__holdout": 0.2, "eval__max_tokens": 2000, "eval__min_document_tokens": 1}
    small = {"kind": "uniform", "tokens_per_device": 128}
    planned = {**PLANNED["parallel__assignment"], "cluster": small}
    common = {**held_out, "parallel__context": {"block": 16}}
    _train(tiny_tree(folder, run__name="static", **common))
    found = {}
    for name, until in (("whole", None), ("broken", 3), ("broken", None)):
        tree = tiny_tree(folder, run__name=name, **common, parallel__assignment=planned)
        start, run = _train(tree, until)
        found[name] = (start, parameter_hash(run.model))
    measured = {**planned, "cost": {"kind": "measured", "repeats": 1}, "calibrate": "online"}
    for name, until in (("first", 3), ("second", None)):
        tree = tiny_tree(folder, run__name="measured", **common, parallel__assignment=measured)
        start, run = _train(tree, until)
        found[name] = (start, run.assignment._cost, run.assignment._calibration.state_dict()["measured"])
    return found


def test_a_planned_run_is_the_static_run_and_resumes_bitwise(tmp_path):
    write_text(tmp_path / "text")
    results = run_ranks(_runs, 2, str(tmp_path))
    for found in results:
        assert found["whole"][0] == 0 and found["broken"][0] == 3
        assert found["whole"][1] == found["broken"][1]
    static, whole, broken = (_records(tmp_path, name) for name in ("static", "whole", "broken"))
    losses = [[r["train/loss"] for r in records if "train/loss" in r] for records in (static, whole, broken)]
    assert len(losses[0]) == 6 and losses[1] == losses[2]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    evaluations = [[r for r in records if "eval/loss" in r] for records in (static, whole)]
    assert len(evaluations[0]) == len(evaluations[1]) >= 1
    for want, have in zip(*evaluations, strict=True):
        assert have.keys() == want.keys()
        for name in want:
            if name.startswith("eval/targets"):
                assert have[name] == want[name]
            elif name.startswith("eval/"):
                np.testing.assert_allclose(have[name], want[name], rtol=1e-4, err_msg=name)
    last = [r for r in whole if "train/loss" in r][-1]
    assert last["balance/lp_predicted_over_measured"] > 0 and last["time/plan_s"] >= 0
    lines = (tmp_path / "outputs" / "broken" / "groups.jsonl").read_text().splitlines()[1:]
    groups = [json.loads(line) for line in lines]
    assert [record["step"] for record in groups] == [1, 2, 3, 4, 5, 6]
    for record in groups:
        assert all(group["predicted_s"] > 0 and group["measured_s"] > 0 for group in record["groups"])
        assert record["measured_s"] >= max(group["measured_s"] for group in record["groups"])
    degrees = {len(group["ranks"]) for record in groups for group in record["groups"]}
    assert degrees == {1, 2}
    # The measured constants and what was corrected since are the checkpoint's.
    first, second = results[0]["first"], results[0]["second"]
    assert second[0] == 3 and second[1] == first[1]
    assert second[2][: len(first[2])] == first[2] and len(second[2]) > len(first[2])
    assert first[1].attention_s + first[1].linear_s > 0
