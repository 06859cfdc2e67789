"""The Triton kernels, interpreted on the CPU, against the fp64 definition: out, lse and every gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_interpreted.py")
# Half precisions: their own rounding of inputs' products and of the result; the arithmetic is fp32.
LIMITS = {"fp16": 2e-3, "bf16": 1.5e-2}
CASES = (
    "plain", "ragged", "gqa_packed", "gqa_odd_group", "per_query_head", "value_dim", "rectangular",
    "block_shapes",
    "documents", "window", "batched_index", "shuffled_positions", "empty_rows", "closed", "closed_documents",
    "closed_window", "closed_shuffled", "strided_input", "fp16", "bf16", "ring", "no_keys",
)  # fmt: skip


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    """Errors of every case, from one process that interprets its kernels."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_every_case_ran(errors):
    assert set(errors) == {*CASES, "tile_visits"}


@pytest.mark.parametrize("case", CASES)
def test_matches_definition(errors, case):
    found = dict(errors[case])
    assert found.pop("repeat", 0.0) == 0.0, "two runs on the same input must agree bit for bit"
    limit = LIMITS.get(case, 1e-5)
    assert all(value <= limit for value in found.values()), found


def test_stays_small(errors):
    # The interpreter takes 7-20 ms a tile.
    assert errors["tile_visits"]["total"] < 2000
