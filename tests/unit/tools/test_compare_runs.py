"""Runs side by side: losses at the tokens that all have seen, ratios against the first."""

import importlib.util
import sys
from pathlib import Path

import pytest
from support.runs import TOKENS_PER_STEP, write_run

from ltrain.metrics.names import METRICS, PREFIXES
from ltrain.report.runs import read_run

TOOLS = Path(__file__).parents[3] / "tools"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_losses_are_compared_at_tokens_that_all_runs_have_seen(tmp_path):
    tool = load("compare_runs")
    runs = [read_run(write_run(tmp_path / n, steps=s)) for n, s in (("a", 20), ("b", 40))]
    assert tool.shared_tokens(runs) == 20 * TOKENS_PER_STEP
    rows = tool.facts(runs)
    at_end = rows[f"training loss at {20 * TOKENS_PER_STEP:,.0f} tokens"]
    expected = [sum(r["train/loss"] for r in run.training[10:20]) / 10 for run in runs]
    assert at_end == pytest.approx(expected)
    assert "MFU, median" not in rows


def test_the_command_prints_ratios_draws_and_refuses(tmp_path, capsys, monkeypatch):
    tool = load("compare_runs")
    a, b = (str(write_run(tmp_path / name, steps=4, seed=len(name))) for name in ("a", "bb"))
    picture = tmp_path / "loss.png"
    monkeypatch.setattr(sys, "argv", ["compare_runs", a, b, "--png", str(picture)])
    assert tool.main() == 0
    assert "x)" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(sys, "argv", ["compare_runs", a, str(tmp_path / "none")])
    assert tool.main() == 2
    assert "is not a folder" in capsys.readouterr().err


def test_the_workspace_shows_every_metric_once_in_a_known_section():
    tool = load("wandb_workspace")
    panels = tool.panel_list()
    names = {name for panel in panels for name in panel["y"]}
    assert names == set(METRICS)
    assert {panel["regex"] for panel in panels} - {None} == {f"^{prefix}" for prefix in PREFIXES}
    assert all(panel["section"] in tool.SECTIONS for panel in panels)


def test_without_the_package_the_panels_are_written_and_the_exit_code_says_so(tmp_path, capsys, monkeypatch):
    tool = load("wandb_workspace")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setattr(sys, "argv", ["wandb_workspace", "team", "project"])
    assert tool.main() == tool.EXIT_MISSING
    assert "no workspace was created" in capsys.readouterr().err
    assert (tmp_path / "wandb_workspace.json").exists()
