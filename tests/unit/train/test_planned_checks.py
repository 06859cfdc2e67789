"""What is refused of a planned assignment before anything starts, and what `ltrain check` says of it."""

from __future__ import annotations

import json

import pytest
import yaml
from support.tiny import tiny_tree, write_text

from ltrain.cli import main

UNIFORM = {"kind": "uniform", "tokens_per_device": 128}
GIVEN = {"kind": "given", "attention_s": 1e-9, "linear_s": 1e-6, "bytes_per_token": 1e4}


def _config(folder, assignment, **overrides) -> str:
    write_text(folder / "text")
    section = {"kind": "planned", "cluster": UNIFORM, **assignment}
    tree = tiny_tree(
        folder, **{"parallel__context": {"block": 16}, **overrides}, parallel__assignment=section
    )
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


@pytest.mark.parametrize("cost", [GIVEN, {"kind": "measured"}], ids=lambda cost: cost["kind"])
def test_check_prints_the_plan_of_a_step(tmp_path, capsys, cost) -> None:
    path = _config(tmp_path, {"cost": cost})
    assert main(["check", path, "--world-size", "4"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "a pool of 4 shards" in out and "micro-batch" in out and "best static" in out
    assert ("measured when the run starts" in out) == (cost["kind"] == "measured")


def _profile(**node) -> dict:
    return {"nodes": [{"devices": 2, "tokens_per_device": 128, "intra": {"gb_s": 10}, **node}]}


@pytest.mark.parametrize(
    ("assignment", "overrides", "profile", "match"),
    [
        (
            {"cluster": {"kind": "uniform", "tokens_per_device": 64}},
            {},
            None,
            "needs 208 tokens of activations, more than any group of the 2 devices holds; the longest "
            "sequence that fits has 128 tokens",
        ),
        ({}, {}, {"nodes": []}, "cluster.nodes=0 must list at least one node"),
        ({}, {}, _profile(devices=3), "must be the 2 shards of the run"),
        ({}, {}, _profile(count=2, devices=1), "cluster.nodes[0].inter=None is missing"),
        ({}, {}, _profile(intra={}), "cluster.nodes[0].intra.gb_s"),
        ({}, {}, _profile(tokens_per_device=None), "cluster.nodes[0].tokens_per_device"),
        ({}, {"parallel__context": {"schedule": "ring"}}, None, "set parallel.assignment.schedules"),
        ({}, {"parallel__context": {"layout": "zigzag"}}, None, "parallel.context.layout='zigzag' must be"),
        ({}, {"parallel__pipeline": 2}, None, "needs parallel.pipeline=1, not 2"),
        ({"cost": GIVEN, "calibrate": "online"}, {"parallel__pipeline": 2}, None, "calibrate='online' needs"),
    ],
)
def test_a_run_that_cannot_be_exits_with_2(tmp_path, capsys, assignment, overrides, profile, match) -> None:
    if profile is not None:
        (tmp_path / "cluster.json").write_text(json.dumps(profile))
        assignment = {"cluster": {"kind": "file", "path": str(tmp_path / "cluster.json")}, **assignment}
    path = _config(tmp_path, assignment, **overrides)
    assert main(["check", path, "--world-size", "2"]) == 2
    assert match in capsys.readouterr().err
