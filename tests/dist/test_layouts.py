"""One step's loss and every gradient are the same on every layout: tensor, pipeline, context and data
parallel."""

from pathlib import Path

import numpy as np
import pytest
from support.distributed import run_ranks
from support.tiny import build, tiny_tree, write_text

CONTEXT = {"degree": 2, "schedule": "ring", "block": 16}
LAYOUTS = {
    1: {"one": {}},
    2: {
        "tp2": {"parallel__tensor": 2},
        "pp2": {"parallel__pipeline": 2},
        "cp2-all-gather": {"parallel__context": {**CONTEXT, "schedule": "all_gather"}},
        "cp2-zigzag": {"parallel__context": {**CONTEXT, "layout": "zigzag", "block": 48}},
    },
    4: {
        "tp2-pp2": {"parallel__tensor": 2, "parallel__pipeline": 2},
        "tp2-cp2": {"parallel__tensor": 2, "parallel__context": CONTEXT},
        "pp2-cp2-ulysses": {"parallel__pipeline": 2, "parallel__context": {**CONTEXT, "schedule": "ulysses"}},
        "cp4-uneven": {"parallel__context": {"degree": 4, "schedule": "ring", "block": 32}},
        "cp2-dp2": {"parallel__context": CONTEXT},
        "tp2-dp2": {"parallel__tensor": 2, "parallel__sequence_parallel": False},
        "dp4": {},
    },
}


def _gradients(folder, overrides):
    from ltrain.train.checkpoint.pieces import pieces
    from ltrain.train.step import reduce_totals, run_model

    run = build(tiny_tree(Path(folder), optimizer__distributed=False, train__z_loss=1e-3, **overrides))
    rows = run.loader.next_step().rows
    run.ddp.zero_grad_buffer()
    result = reduce_totals(run_model(run.ddp, run.mesh, run.assignment.batches(rows), train=True), run.mesh)
    grads = []
    by_pointer = {p.data_ptr(): p for p in run.model.parameters()}
    for piece in pieces(run.model, None, run.mesh):
        if run.mesh.data_context.rank == 0:
            grad = by_pointer[piece.tensor.data_ptr()].main_grad
            grads.append((piece.place, grad.detach().numpy().copy()))
    lengths = [n for row in rows for n in row.document_lengths]
    return result.loss, result.num_targets, grads, lengths


def _run(rank, world_size, folder):
    outcomes = {}
    for name, overrides in LAYOUTS[world_size].items():
        outcomes[name] = _gradients(folder, {**overrides, "run__name": name})
    return outcomes


def _assemble(parts):
    whole = {}
    for place, grad in parts:
        array = whole.setdefault(place.name, np.full(place.shape, np.nan))
        box = tuple(slice(s, s + n) for s, n in zip(place.start, place.box, strict=True))
        array[box] = grad.reshape(place.box)
    return whole


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    write_text(folder / "text")
    loss, targets, parts, lengths = run_ranks(_run, 1, str(folder))[0]["one"]
    assert len(lengths) > 4, "rows must hold several documents"
    return folder, loss, targets, _assemble(parts)


@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_gradients_agree(reference, world_size):
    folder, loss, targets, whole = reference
    outcomes = run_ranks(_run, world_size, str(folder))
    for name in LAYOUTS[world_size]:
        parts = [part for outcome in outcomes for part in outcome[name][2]]
        assert outcomes[0][name][1] == targets, name
        np.testing.assert_allclose(outcomes[0][name][0], loss, rtol=1e-6, err_msg=name)
        grads = _assemble(parts)
        assert grads.keys() == whole.keys(), name
        for parameter, want in whole.items():
            have = grads[parameter][: want.shape[0]]
            error = np.linalg.norm(have - want) / np.linalg.norm(want)
            assert error < 1e-5, f"{name}: {parameter} differs by {error:.1e}"
