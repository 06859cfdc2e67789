"""What W&B and TensorBoard hold after a run and its continuation, read back from their own files."""

import json
import struct

import pytest

from ltrain.metrics.sinks import TensorBoard, WandB

FIRST = {1: {"train/loss": 2.5, "train/tokens": 100.0}, 2: {"train/loss": 2.25, "train/tokens": 200.0}}
SECOND = {3: {"train/loss": 2.0, "train/tokens": 300.0}, 4: {"eval/loss": 1.5}}


def _wandb_records(path):
    """The records of a `.wandb` file: LevelDB's log format, each a protocol buffer."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several pieces
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def _history(records):
    rows = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            rows[items["_step"]] = items
    return rows


def test_an_offline_run_is_continued_under_its_id_and_each_step_stands_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    for part in (FIRST, SECOND):
        sink = WandB(
            tmp_path, mode="offline", project="p", name="run", tags=("a",), config={"train": {"steps": 4}}
        )
        for step, metrics in part.items():
            sink.write(step, metrics)
        sink.close()
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    rows, ids = {}, set()
    for path in files:
        records = list(_wandb_records(path))
        ids |= {r.run.run_id for r in records if r.WhichOneof("record_type") == "run"}
        found = _history(records)
        assert not rows.keys() & found.keys(), "the second part begins after the first"
        rows |= found
        assert b"0123456789abcdef" not in path.read_bytes()
    assert ids == {(tmp_path / "wandb_id").read_text()}
    for step, metrics in {**FIRST, **SECOND}.items():
        assert {name: rows[step][name] for name in metrics} == metrics
        assert rows[step]["train/step"] == step


def test_tensorboard_gives_back_what_was_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for part in (FIRST, SECOND):
        sink = TensorBoard(tmp_path)
        for step, metrics in part.items():
            sink.write(step, metrics)
        sink.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert set(found.Tags()["scalars"]) == {"train/loss", "train/tokens", "eval/loss"}
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [(1, 2.5), (2, 2.25), (3, 2.0)]
    assert [(e.step, e.value) for e in found.Scalars("eval/loss")] == [(4, 1.5)]
