"""The tables: loss by position before and after, and within and beyond the base model's context."""

import pytest
from support.runs import write_run

from ltrain.report.runs import Evaluation, RunLog, read_run
from ltrain.report.tables import facts_table, mean_loss, position_table

BEFORE = {256: 2.0, 512: 1.0, 1024: 4.0}
AFTER = {256: 1.9, 512: 1.1, 1024: 1.5}


def run_of(evaluations: list[dict], tmp_path, context: int = 512) -> RunLog:
    records = [
        {
            "step": 10 * i,
            "time": float(i),
            "eval/loss": e["loss"],
            **{f"eval/loss_pos/{end}": v for end, v in e["by_position"].items()},
            **{f"eval/targets_pos/{end}": v for end, v in e.get("targets", {}).items()},
        }
        for i, e in enumerate(evaluations)
    ]
    config = {"model": {"kind": "new", "max_position_embeddings": context}}
    return RunLog(tmp_path, "run", config, records)


def test_before_after_and_change_of_every_bucket(tmp_path):
    table = position_table(
        run_of([{"loss": 2.5, "by_position": BEFORE}, {"loss": 1.5, "by_position": AFTER}], tmp_path)
    )
    assert table is not None
    assert table.heads == ("positions", "before (step 0)", "after (step 10)", "change")
    assert table.rows == (
        ("0 to 255", "2.0000", "1.9000", "-0.1000 (-5.0 %)"),
        ("256 to 511", "1.0000", "1.1000", "+0.1000 (+10.0 %)"),
        ("512 to 1,023", "4.0000", "1.5000", "-2.5000 (-62.5 %)"),
        ("all", "2.5000", "1.5000", "-1.0000 (-40.0 %)"),
    )
    assert table.notes[0].startswith("Loss within the base model's context of 512 tokens: 1.5000 before")
    assert table.notes[1].startswith("Loss beyond the base model's context of 512 tokens: 4.0000 before")
    assert "1.5000 after, -2.5000 (-62.5 %)" in table.notes[1]


def test_known_target_counts_weigh_the_means(tmp_path):
    targets = {256: 300.0, 512: 100.0, 1024: 50.0}
    evaluation = Evaluation(0, 2.0, BEFORE, targets)
    assert mean_loss(evaluation, 0, 512) == pytest.approx((2.0 * 300 + 1.0 * 100) / 400)
    assert mean_loss(Evaluation(0, 2.0, BEFORE), 0, 512) == pytest.approx(1.5)
    counted = {"loss": 2.0, "by_position": BEFORE, "targets": targets}
    table = position_table(run_of([counted, counted], tmp_path))
    assert table is not None
    assert "mean over target tokens" in table.notes[0]


def test_a_bucket_across_the_border_counts_as_neither_side(tmp_path):
    table = position_table(run_of([{"loss": 2.0, "by_position": BEFORE}] * 2, tmp_path, context=300))
    assert table is not None
    assert "2.0000 before" in table.notes[0]
    assert "4.0000 before" in table.notes[1]
    assert "256 to 511" in table.notes[2]


def test_one_evaluation_is_no_comparison(tmp_path):
    table = position_table(run_of([{"loss": 2.0, "by_position": BEFORE}], tmp_path))
    assert table is not None
    assert table.heads == ("positions", "step 0")
    assert table.rows[-1] == ("all", "2.0000")


def test_without_evaluations_there_is_no_table(tmp_path):
    assert position_table(RunLog(tmp_path, "run", {}, [{"step": 1, "time": 0.0, "train/loss": 2.0}])) is None


def test_facts_stand_beside_one_another(tmp_path):
    runs = [read_run(write_run(tmp_path / n, steps=4, extras=n == "b")) for n in "ab"]
    rows = {row[0]: row[1:] for row in facts_table(runs).rows}
    assert rows["tokens seen"] == ("65,536", "65,536")
    assert rows["MFU, median"][0] == "-"
    assert rows["MFU, median"][1].endswith("%")
