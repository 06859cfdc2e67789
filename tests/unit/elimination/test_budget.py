"""Greedy allocation, executed FLOPs by mode, and configurations that are refused."""

import json

import pytest
from support.tiny import tiny_tree

from ltrain.cli import main
from ltrain.config.model import NewModel
from ltrain.elimination.budget import LEVELS, allocate
from ltrain.model.families import resolve_spec
from ltrain.model.flops import step_flops


def test_the_cheapest_layers_pay():
    losses = [[0, 0.5, 1, 2, 4], [0, 0.0, 0.01, 0.02, 0.03], [0, 0.1, 0.2, 0.3, 0.4]]
    found = allocate(losses, sum, 0.75)
    assert found.ratios == (1.0, 0.25, 1.0) and found.reached
    assert found.share == pytest.approx(0.75) and found.predicted_loss == 0.03
    tight = allocate(losses, sum, 0.5)
    assert tight.ratios == (1.0, 0.25, 0.25)
    assert not allocate(losses, sum, 0.1).reached
    assert allocate(losses, sum, 0.1).ratios == (LEVELS[-1],) * 3


def test_a_level_that_measures_badly_does_not_block_the_way():
    assert allocate([[0, 9, 0.1, 9, 9]], sum, 0.5).ratios == (0.5,)


def test_executed_flops_follow_the_mode():
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 48}
    spec = resolve_spec(NewModel(**shape, max_position_embeddings=64, vocab_size=100))
    dense = step_flops(spec, [64])
    projections, mlp = 2 * 64 * 32 * (32 * 2 + 16 * 2), 2 * 64 * 3 * 32 * 48
    attention = 4 * 32 * 64 * 65 // 2
    saved = {
        "qkv": 3 * 0.5 * projections + 3 * 0.75 * attention,
        "q": 3 * 0.75 * attention,
        "layer": 3 * 0.5 * (projections + mlp) + 3 * 0.75 * attention,
        "backward": (3 - 1 - 3 * 0.5) * projections + 2 * 0.75 * attention,
    }
    for mode, expected in saved.items():
        sparse = step_flops(spec, [64], densities=[1.0, 0.25], kept=[1.0, 0.5], mode=mode)
        assert sparse.model == dense.model
        assert dense.executed - sparse.executed == pytest.approx(expected), mode
        assert step_flops(spec, [64], kept=[1.0, 1.0], mode=mode) == dense


@pytest.mark.parametrize(
    "fields,says",
    [
        ({"ratio": 0}, "elimination.ratio"),
        ({"ratio": 1.5}, "elimination.ratio"),
        ({"ratio": [0.5, 0.5, 0.5]}, "elimination.ratio=3 must hold one number for each of the model's 2"),
        ({"ratio": "half"}, "must be a number, a list, or file:PATH"),
        ({"block": 12}, "elimination.block=12 must divide parallel.context.block=16"),
        ({"strata": 3}, "elimination.strata=3 must be a multiple of 2 x parallel.tensor x parallel"),
        ({"strata": 16}, "elimination.strata=16 must not exceed the 13 blocks"),
        ({"strata": 8, "ratio": 0.2}, "leaves less than a block a stratum"),
        ({"dense_layers": [5]}, "elimination.dense_layers=5 must lie in 0..1"),
        ({"scorer": {"kind": "predictor", "path": "none"}}, "is not a predictor"),
        ({"scorer": {"kind": "poled"}}, "elimination.scorer.kind='poled' must be one of"),
    ],
)  # fmt: skip
def test_bad_elimination_is_refused(fields, says, tmp_path, capsys):
    tree = tiny_tree(tmp_path, elimination={"kind": "blocks", "strata": 4, **fields})
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree))
    assert main(["check", str(path)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields,parallel,says",
    [
        ({"scorer": {"kind": "lemo"}}, {"context": {"degree": 2}}, "must lie on one rank"),
        ({"scorer": {"kind": "predictor", "path": "x"}}, {"tensor": 2}, "sequence parallelism cuts"),
        ({"strata": 4}, {"tensor": 2, "context": {"degree": 2}}, "context.degree = 8; use 8"),
    ],
)
def test_what_cannot_be_combined_is_refused(fields, parallel, says, tmp_path, capsys):
    parallel = {**parallel, "context": {"block": 16, **parallel.get("context", {})}}
    tree = tiny_tree(
        tmp_path, elimination={"kind": "blocks", "strata": 8, **fields}, parallel=parallel,
        train__seq_len=256, train__tokens_per_step=1024,
    )  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree))
    world = parallel["context"].get("degree", 1) * parallel.get("tensor", 1)
    assert main(["check", str(path), "--world-size", str(world)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("pattern", [{"kind": "nsa"}, {"kind": "vertical_slash", "verticals": "tokens"}])
def test_patterns_that_elimination_cannot_cut_are_refused(pattern, tmp_path, capsys):
    tree = tiny_tree(tmp_path, elimination={"kind": "blocks", "strata": 4}, attention={"pattern": pattern})
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree))
    assert main(["check", str(path)]) == 2
    assert "elimination" in capsys.readouterr().err
