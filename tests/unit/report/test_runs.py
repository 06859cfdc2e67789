"""Reading a run folder: what stands in it, and what a damaged one gets."""

import json
from pathlib import Path

import pytest
import yaml
from support.runs import BUCKETS, TOKENS_PER_STEP, write_run

from ltrain.config.base import ConfigError
from ltrain.report.runs import read_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", steps=8)


def append(folder: Path, text: str) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(text)


def test_records_evaluations_and_the_base_model_are_read(folder):
    run = read_run(folder)
    assert run.name == "run"
    assert [r["step"] for r in run.training] == list(range(1, 9))
    assert [e.step for e in run.evaluations] == [0, 8]
    assert tuple(run.evaluations[0].by_position) == BUCKETS
    assert run.base_context == 512
    assert run.setting("train.seq_len") == 4096
    assert run.setting("train.nothing.here") is None


def test_an_evaluation_stands_at_the_tokens_of_its_step(folder):
    x, y = read_run(folder).series("eval/loss")
    assert x == [0, 8 * TOKENS_PER_STEP]
    assert len(y) == 2


def test_minutes_count_from_the_first_record(folder):
    run = read_run(folder)
    x, _ = run.series("train/loss", x="minutes")
    assert x[0] == pytest.approx((run.training[0]["time"] - run.records[0]["time"]) / 60)
    assert x == sorted(x)


def test_values_that_were_not_finite_are_left_out(folder):
    append(folder, '{"step": 9, "time": 1700000100.0, "train/loss": null, "train/grad_norm": NaN}\n')
    run = read_run(folder)
    assert len(run.series("train/loss")[0]) == 8
    assert len(run.series("train/grad_norm")[0]) == 8


def test_a_last_line_that_was_cut_is_no_damage(folder):
    append(folder, '{"step": 9, "time": 17000')
    assert read_run(folder).training[-1]["step"] == 8


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{broken", "is not JSON"),
        ("[1, 2]", "is not a JSON object"),
        ('{"time": 1.0}', "step"),
        ('{"step": true, "time": 1.0}', "step"),
        ('{"step": 1}', "time"),
        ('{"step": 1, "time": 1.0, "train/loss": "high"}', "train/loss"),
        ('{"step": 1, "time": 1.0, "train/loss": 1' + "0" * 400 + "}", "no metric reaches"),
        ('{"schema": 99}', "schema 99"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_damaged_line_is_named(folder, line, rule):
    append(folder, line + "\n" + json.dumps({"step": 10, "time": 2.0}) + "\n")
    with pytest.raises(ConfigError) as raised:
        read_run(folder)
    assert rule in str(raised.value)
    assert "metrics.jsonl:12" in str(raised.value.value)


def test_missing_or_unreadable_files_are_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        read_run(tmp_path / "nothing")
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_run(folder)
    (folder / "config.yaml").write_text("text")
    with pytest.raises(ConfigError, match="sections"):
        read_run(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"config\.yaml.*cannot be read"):
        read_run(folder)


def test_a_run_without_records_is_refused(folder):
    (folder / "metrics.jsonl").write_text('{"schema": 1}\n')
    with pytest.raises(ConfigError, match="no record yet"):
        read_run(folder)
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_run(folder)


def test_a_base_model_that_is_gone_has_no_known_context(folder):
    (folder / "base" / "config.json").unlink()
    assert read_run(folder).base_context is None


def test_a_relative_model_path_is_meant_from_where_the_run_was_started(tmp_path):
    folder = write_run(tmp_path / "outputs" / "run", steps=2, base_context=640)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "base").rename(tmp_path / "base")
    config["run"] |= {"output": "outputs", "name": "run"}
    config["model"]["path"] = "base"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_run(folder).base_context == 640
    config["run"]["output"] = "elsewhere"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_run(folder).base_context is None
