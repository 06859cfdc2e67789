"""The learned predictor: it learns, it shrinks without changing what it says, it stays with its model."""

import json
from pathlib import Path

import pytest
import torch
from support.elimination import make_context, make_elimination, make_model
from support.tiny import tiny_tree, write_text

from ltrain.cli import main
from ltrain.config.base import ConfigError
from ltrain.elimination.fit import Fit, FitSettings, pair_loss
from ltrain.elimination.predictor import (
    ElasticNetwork,
    LayerPredictor,
    Predicted,
    PredictorShape,
    check_predictor,
    load_predictor,
    new_predictor,
    save_predictor,
    token_blocks,
)
from ltrain.parallel.mesh import init_mesh, init_process_group

SHAPE = PredictorShape(num_layers=2, hidden_size=32, num_heads=4, block=8, hidden=16, inner=24, rank=8)


@pytest.fixture(scope="module")
def mesh():
    init_process_group(60)
    return init_mesh()


def test_the_loss_falls_on_a_fixed_batch():
    torch.manual_seed(0)
    predictor = LayerPredictor(SHAPE)
    blocks, target = torch.randn(12, 8, 32), torch.rand(12, 12) * 2
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=3e-3)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = pair_loss(predictor, blocks, target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 5


def test_neurons_that_never_fire_go_without_a_trace():
    torch.manual_seed(0)
    network = ElasticNetwork((10, 16, 12, 4))
    with torch.no_grad():
        # Dead neurons: weights that are negative on inputs that are positive.
        network.weights[0][3:7] = -1.0
        network.weights[1][5] = -1.0
    x = torch.rand(20, 3, 10)
    before = network(x)
    old = set(network.parameters())
    assert network.prune(1.0) >= 5
    assert network.sizes[1] <= 12 and network.sizes[2] <= 11
    assert [len(z) for z in network.zeros] == network.sizes[1:-1]
    torch.testing.assert_close(network(x), before, rtol=1e-5, atol=1e-6)
    assert not old & set(list(network.parameters())[:2])
    assert network.prune(0.0) == 0, "a layer never loses all of its neurons"


def test_pruning_rebuilds_the_optimizer():
    layers = new_predictor(SHAPE)
    fit = Fit(layers, FitSettings(prune_every=1, warmup_steps=1))
    with torch.no_grad():
        for layer in layers:
            layer.query.weights[0][:4] = 0.0
    first = fit.optimizer
    for layer in layers:
        layer(torch.randn(4, 8, 32))
    assert fit.prune() > 0
    assert fit.optimizer is not first
    live = {id(p) for p in layers.parameters()}
    assert {id(p) for group in fit.optimizer.param_groups for p in group["params"]} == live


def test_scores_are_predicted_column_sums_of_each_document(mesh, tmp_path):
    predicted = Predicted(new_predictor(SHAPE))
    elimination = make_elimination(scorer=predicted, ratio=0.4)
    layer = make_model(tmp_path / "llama", mesh, elimination).decoder.layers[1].train()
    docs = torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor([40, 27]))
    context = make_context(67, docs)
    x = torch.randn(67, 1, 32, dtype=torch.float64)
    inputs = layer._inputs(x, context)
    found = predicted.score(inputs)
    pairs = predicted.layers[1].pairs(token_blocks(inputs)) * SHAPE.num_heads
    same = torch.block_diag(torch.ones(5, 5), torch.ones(4, 4))
    torch.testing.assert_close(found, (pairs * same).sum(0), rtol=1e-4, atol=1e-4)
    before = torch.get_rng_state()
    out, _ = layer(x.requires_grad_(), packed_seq_params=context)
    out.sum().backward()
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None for p in predicted.layers.parameters())
    assert not any("predict" in name for name, _ in layer.named_parameters())


def test_saved_sizes_come_back_and_other_models_are_refused(tmp_path):
    layers = new_predictor(SHAPE)
    for layer in layers:
        layer.query.zeros[0][:5] = 1.0
        layer.query.seen = 1
        layer.query.prune(1.0)
    save_predictor(layers, SHAPE, tmp_path, fingerprint="abc", facts={"steps": 1})
    fits = {"fingerprint": "abc", "block": 8, "num_layers": 2}
    again = load_predictor(tmp_path, **fits)
    assert again.layers[0].query.sizes[1] == 11
    blocks = torch.randn(3, 8, 32)
    for a, b in zip(layers, again.layers, strict=True):
        assert torch.equal(a.eval().pairs(blocks), b.pairs(blocks))
    for change, says in (
        ({"fingerprint": "other"}, "was fitted to another model"),
        ({"block": 16}, "was fitted to blocks of 8 tokens"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_predictor(tmp_path, **(fits | change))
    with pytest.raises(ConfigError, match="is not a predictor"):
        check_predictor(tmp_path / "none", **fits)


def _config(folder: Path, **elimination) -> Path:
    section = {"kind": "blocks", "ratio": 0.5, "strata": 2, "block": 8, **elimination}
    tree = tiny_tree(
        folder, elimination=section, train__seq_len=128, train__tokens_per_step=256, train__steps=2
    )
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree))
    return path


def test_fit_then_train_with_it(tmp_path, capsys):
    import torch.distributed as dist

    write_text(tmp_path / "text")
    path = _config(tmp_path, scorer={"kind": "predictor", "path": str(tmp_path / "predictor")})
    if dist.is_initialized():
        dist.destroy_process_group()
    assert main(["check", str(path)]) == 2
    assert "is not a predictor" in capsys.readouterr().err
    assert main(["fit-predictor", str(path), "--steps", "6", "--prune-every", "3"]) == 0
    facts = json.loads((tmp_path / "predictor" / "predictor.json").read_text())
    assert facts["last_loss"] < facts["first_loss"] and 0 <= facts["recall_at_0.4"] <= 1
    assert main(["train", str(path)]) == 0
    assert main(["train", str(path), "--run.seed", "9", "--run.name", "other"]) == 2
    assert "was fitted to another model" in capsys.readouterr().err


def test_calibrated_ratios_are_taken_by_a_run(tmp_path, capsys):
    import torch.distributed as dist

    write_text(tmp_path / "text")
    path, out = _config(tmp_path), tmp_path / "ratios.json"
    if dist.is_initialized():
        dist.destroy_process_group()
    run = ["calibrate-elimination", str(path), "--out", str(out), "--rows", "2"]
    assert main([*run, "--target-flops", "0.9"]) == 0
    found = json.loads(out.read_text())
    assert found["reached_share"] <= 0.9 and min(found["ratios"]) < 1
    assert main(["check", str(path), "--elimination.ratio", f"file:{out}"]) == 0
    for level in ("none", "full"):
        assert main([*run, "--target-bytes", "0.9", "--memory.level", level]) == 0
        assert json.loads(out.read_text())["reached_share"] <= 0.9
    assert main([*run, "--target-flops", "1.5"]) == 2
    assert "--target-flops=1.5 must lie between 0 and 1" in capsys.readouterr().err
    assert main([*run, "--target-bytes", "0.8", "--elimination.mode", "q"]) == 2
    assert "saves as many bytes as dense; give --target-flops" in capsys.readouterr().err
    assert main(["check", str(path), "--elimination.ratio", f"file:{path}"]) == 2
    assert "is not a file of elimination ratios" in capsys.readouterr().err
    assert (
        main(["check", str(path), "--elimination.ratio", f"file:{out}", "--elimination.mode", "layer"]) == 2
    )
    assert "was calibrated for mode 'qkv'" in capsys.readouterr().err
