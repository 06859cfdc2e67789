"""Every schedule equals single-process attention, on any number of ranks."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from support.distributed import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
from context_parallel_cases import BASE, Case, assert_close, grid, run_case, run_sizes

FLAT = ["ring", "all_gather", "ulysses", "needed"]
ON_NODES = ["hierarchical", "nested_ring", "ulysses_ring"]


def windows() -> list[Case]:
    base = replace(BASE, schedule="halo", pattern="window")
    return [
        replace(base, layout="contiguous", tokens=310, heads_of_mask="one"),
        replace(base, layout="contiguous", tokens=400, heads_of_mask="query", docs=(40,), batch=2),
        replace(base, layout="zigzag", tokens=700, verticals="kv"),
    ]


def test_one_rank_without_a_group() -> None:
    cases = grid(FLAT) + grid(ON_NODES, 1, [0, 1])
    assert_close(cases, [[run_case(case, None, 0, 1) for case in cases]], 1e-12)


def test_equals_single_process() -> None:
    cases = {
        2: grid(FLAT, variants=[0, 3, 5, 7]) + grid(ON_NODES, 1, [1, 9]),
        3: grid(FLAT) + grid(ON_NODES, 3, [1, 3]),
        4: grid(FLAT, variants=[1, 4, 8]) + grid(ON_NODES, 2),
        5: grid(FLAT, variants=[1, 5]),
        6: windows() + grid(ON_NODES, 2, [0, 1, 3, 6]) + grid(ON_NODES, 3, [1, 4]),
        7: grid(FLAT, variants=[3, 7]),
    }
    by_rank = run_ranks(run_sizes, 7, cases)
    for size, todo in cases.items():
        assert_close(todo, [results[size] for results in by_rank if size in results], 1e-12)
