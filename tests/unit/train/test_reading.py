"""Checkpoints whose checksums fit and whose indexes lie: found before anything is allocated."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ltrain.train.checkpoint.folder import CheckpointError
from ltrain.train.checkpoint.reading import CheckpointReader

STATE = {"step": 2, "tokens": 8, "skipped_steps": 0, "rollbacks": 0, "optimizer_steps": 2}
STATE |= {"loader": {}, "layout": {}, "fingerprint": "x"}


def _entry(first: int, last: int, **changes: Any) -> dict[str, Any]:
    whole = {"kind": "param", "name": "w", "shape": [4, 6], "start": [0, 0], "box": [4, 6]}
    return {**whole, "first": first, "last": last, **changes}


def _write(folder, entries, state=STATE):
    tensors = {key: torch.arange(entry["last"] - entry["first"]).float() for key, entry in entries.items()}
    save_file({k: v for k, v in tensors.items() if v.numel() < 100}, folder / "rank-00000.safetensors")
    (folder / "rank-00000.json").write_text(json.dumps({"private": {}, "pieces": entries}))
    (folder / "state.json").write_text(json.dumps(state))


def test_runs_of_any_order_make_the_tensor(tmp_path):
    _write(tmp_path, {"b": _entry(10, 24), "a": _entry(0, 10)})
    whole = CheckpointReader(tmp_path).whole("param", "w")
    assert torch.equal(whole.flatten(), torch.cat([torch.arange(10.0), torch.arange(14.0)]))


@pytest.mark.parametrize(
    "entries",
    [
        {"a": _entry(0, 10), "b": _entry(12, 24)},
        {"a": _entry(0, 14), "b": _entry(10, 24)},
        {"a": _entry(0, 24), "b": _entry(0, 24)},
        {"a": _entry(0, 24, shape=[8, 6])},
        {"a": _entry(0, 12, box=[2, 6]), "b": _entry(0, 12, box=[2, 6], start=[1, 0])},
        {"a": _entry(0, 1 << 50, shape=[1 << 50], start=[0], box=[1 << 50])},
        {"a": _entry(0, 24, box=[4, -6])},
        {"a": _entry(0, 24, start=[1, 0])},
        {"a": _entry(0, 24, shape=[4, "six"])},
    ],
    ids=["gap", "overlap", "twice", "short", "boxes", "forged", "negative", "outside", "types"],
)
def test_an_index_that_does_not_fit_its_tensors_is_refused(tmp_path, entries):
    sound = {"a": _entry(0, 24)}
    _write(tmp_path, sound)
    kept = {k: v for k, v in entries.items() if v["last"] < 1 << 40}
    _write(tmp_path, kept or sound)
    (tmp_path / "rank-00000.json").write_text(json.dumps({"private": {}, "pieces": entries}))
    with pytest.raises(CheckpointError):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"step": "x"}, {"loader": None}, {"layout": 3}, {"tokens": None}]
)
def test_a_state_that_is_none_is_refused(tmp_path, change):
    _write(tmp_path, {"a": _entry(0, 24)}, {**STATE, **change})
    with pytest.raises(CheckpointError, match=r"state\.json"):
        CheckpointReader(tmp_path)
