"""Every dense-capable schedule equals single-process attention, on any number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.distributed import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
from context_parallel_cases import Case, assert_close, grid, run_cases

SCHEDULES = ["ring", "all_gather", "ulysses"]


@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_equals_single_process(world: int) -> None:
    cases = grid(SCHEDULES, world)
    assert_close(cases, run_ranks(run_cases, world, cases), 1e-12)


def test_one_rank_without_a_group() -> None:
    cases = grid(SCHEDULES, 1)
    assert_close(cases, [run_cases_alone(cases)], 1e-12)


def run_cases_alone(cases: list[Case]) -> list[dict]:
    from context_parallel_cases import run_case

    return [run_case(case, None, 0, 1) for case in cases]


def test_subgroup_without_rank_zero() -> None:
    cases = [Case(s, docs=(50,), dtype=torch.float32) for s in SCHEDULES]
    assert_close(cases, run_ranks(run_cases, 4, cases, True), 1e-5)
