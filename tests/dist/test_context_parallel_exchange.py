"""What is sent, and what is refused: counted bytes against formulas, errors on all ranks, auto,
calibration."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.distributed import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
from context_parallel_cases import BASE, Case, errors, run_case

from ltrain.attention.calibrate import calibrate
from ltrain.attention.context_parallel import context_parallel_attention
from ltrain.attention.profile import PROFILES
from ltrain.config.base import ConfigError
from ltrain.parallel.collectives import Channel
from ltrain.parallel.layout import SequenceLayout
from ltrain_kernels.block_sparse import BlockIndex, closed

WORLD, NODE = 4, 2
EVEN = replace(BASE, tokens=256, value_dim=12, pattern="dense", heads_of_mask="one", dtype=torch.float32)
COUNTED = [
    replace(EVEN, schedule="ring"),
    replace(EVEN, schedule="all_gather"),
    replace(EVEN, schedule="ulysses", q_heads=8, kv_heads=4),
    replace(EVEN, schedule="hierarchical", node_size=NODE),
    replace(EVEN, schedule="nested_ring", node_size=NODE),
    replace(EVEN, schedule="needed", layout="contiguous", pattern="window"),
    replace(EVEN, schedule="needed", layout="contiguous", pattern="strided", heads_of_mask="kv"),
]
BF16 = [
    replace(
        EVEN,
        schedule=s,
        dtype=torch.bfloat16,
        pattern="random",
        heads_of_mask="kv",
        tokens=500,
        node_size=NODE,
    )
    for s in ("ring", "hierarchical", "needed")
]
AUTO = [
    replace(EVEN, schedule="auto", node_size=NODE),
    replace(EVEN, schedule="auto", node_size=NODE, batch=2),
]


def run(rank: int, world: int) -> dict[str, Any]:
    group = dist.group.WORLD
    found: dict[str, Any] = {
        name: [run_case(case, group, rank, world) for case in cases]
        for name, cases in (("counted", COUNTED), ("bf16", BF16), ("auto", AUTO))
    }
    found["buffers"] = [forward_buffers(case, rank, world) for case in COUNTED]
    found["errors"] = refusals(rank, world)
    found["profile"] = calibrate(group, node_size=NODE, tokens=512, heads=2, head_dim=16)
    return found


class Buffers:
    """Bytes of all received tensors that are alive, and the most there were at one time."""

    def __init__(self) -> None:
        self.alive = self.most = 0

    def __enter__(self) -> Buffers:
        self.original = {name: getattr(Channel, name) for name in ("exchange", "all_gather", "all_to_all")}
        for name, method in self.original.items():
            setattr(Channel, name, self._watched(method))
        return self

    def __exit__(self, *error: object) -> None:
        for name, method in self.original.items():
            setattr(Channel, name, method)

    def _watched(self, method: Any) -> Any:
        def call(channel: Channel, *args: Any, **options: Any) -> Any:
            pending = method(channel, *args, **options)
            for tensor in pending.received:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    weakref.finalize(tensor, self._freed, tensor.nbytes, id(tensor), seen)
                    self.alive += tensor.nbytes
            self.most = max(self.most, self.alive)
            return pending

        seen: set[int] = set()
        return call

    def _freed(self, num_bytes: int, key: int, seen: set[int]) -> None:
        self.alive -= num_bytes
        seen.discard(key)


def forward_buffers(case: Case, rank: int, world: int) -> int:
    layout = case.make_layout(world)
    whole = case.tensors()
    q, k, v = (layout.shard(whole[name], rank, 1) for name in "qkv")
    index = BlockIndex.from_mask(case.block_mask(), case.block, case.block)
    with Buffers() as buffers:
        context_parallel_attention(
            q,
            k,
            v,
            layout=layout,
            group=dist.group.WORLD,
            index=index,
            schedule=case.schedule,
            node_size=case.node_size,
        )
    return buffers.most


def refusals(rank: int, world: int) -> dict[str, str]:
    """The error of each bad input; a missing key means that no error came."""
    layout = SequenceLayout("striped", 256, world, 16)
    index = closed.dense(256, 16)
    q = torch.zeros(1, layout.length(rank), 4, 8)
    good: dict[str, Any] = {"layout": layout, "group": dist.group.WORLD, "index": index, "schedule": "ring"}
    another = SequenceLayout("zigzag", 256, world, 16)
    bad = {
        "node size": {"schedule": "hierarchical", "node_size": 3},
        "no node size": {"schedule": "nested_ring"},
        "halo": {"schedule": "halo"},
        "name": {"schedule": "rings"},
        "one rank's layout": {"layout": another if rank == 1 else layout},
        "one rank's index": {"index": closed.sliding_window(256, 16, local=2) if rank == 2 else index},
        "one rank's schedule": {"schedule": "all_gather" if rank == 3 else "ring"},
        "block": {"index": closed.dense(256, 32)},
        "documents": {"doc_ids": torch.zeros(255, dtype=torch.int32)},
        "profile": {"schedule": "auto", "profile": replace(PROFILES["h200"], device="another")},
    }
    found = {}
    for name, change in bad.items():
        try:
            context_parallel_attention(q, q, q, **{**good, **change})
        except ConfigError as error:
            found[name] = str(error)
    try:
        x = q if rank != 1 else q[:, 1:]
        context_parallel_attention(x, x, x, **good)
    except ConfigError as error:
        found["one rank's length"] = str(error)
    # Everybody is still in step.
    out, _ = context_parallel_attention(q, q, q, **good)
    assert out.shape == q.shape
    return found


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(run, WORLD)


def test_counted_bytes_are_the_formula(results: list[dict[str, Any]]) -> None:
    def sent(number: int, name: str) -> list[int]:
        return [r["counted"][number][name] for r in results]

    shard, item = 256 // WORLD, 4
    kv = shard * 2 * (8 + 12) * item
    assert sent(0, "forward_bytes") == [(WORLD - 1) * kv] * WORLD
    assert sent(0, "backward_bytes") == [2 * (WORLD - 1) * kv] * WORLD
    assert sent(1, "forward_bytes") == [(WORLD - 1) * kv] * WORLD
    assert sent(1, "backward_bytes") == [2 * (WORLD - 1) * kv] * WORLD
    away = (WORLD - 1) * shard // WORLD
    assert sent(2, "forward_bytes") == [away * item * (12 * (8 + 12) + 8)] * WORLD
    # dout and delta out, then dq, dk and dv back; q, k, v and lse were kept.
    assert sent(2, "backward_bytes") == [away * item * (8 * 12 + 8 + 8 * 8 + 4 * (8 + 12))] * WORLD
    lanes, nodes = NODE, WORLD // NODE
    assert sent(3, "forward_bytes") == [(nodes * (lanes - 1) + nodes - 1) * kv] * WORLD
    assert sent(3, "backward_bytes") == [2 * (nodes * (lanes - 1) + nodes - 1) * kv] * WORLD
    assert sent(3, "between_nodes") == [3 * (nodes - 1) * kv] * WORLD
    assert sent(4, "forward_bytes") == [(nodes * (lanes - 1) + nodes - 1) * kv] * WORLD
    assert sent(4, "between_nodes") == [3 * (nodes - 1) * kv] * WORLD


def test_needed_sends_the_needed_blocks_and_back(results: list[dict[str, Any]]) -> None:
    one_block = 16 * (8 + 12) * 4
    window = [r["counted"][5]["forward_bytes"] for r in results]
    # A window of three blocks: two blocks of both kv heads to the next rank; the last rank has no next.
    assert window == [2 * 2 * one_block] * (WORLD - 1) + [0]
    strided = sum(r["counted"][6]["forward_bytes"] for r in results)
    case = COUNTED[6]
    mask, owner = case.block_mask()[0], case.make_layout(WORLD).block_owner
    pairs = {(int(owner[i]), h, int(j)) for h, i, j in mask.nonzero().tolist() if owner[i] != owner[j]}
    assert strided == len(pairs) * one_block
    for number in (5, 6):
        for r in results:
            assert r["counted"][number]["backward_bytes"] <= 2 * max(
                r["counted"][number]["forward_bytes"], strided
            )


def test_sparse_backward_traffic_is_at_most_twice_forward(results: list[dict[str, Any]]) -> None:
    for number in range(len(COUNTED)):
        forward, backward = (
            sum(r["counted"][number][f"{d}_bytes"] for r in results) for d in ("forward", "backward")
        )
        assert backward <= 2 * forward, COUNTED[number]


def test_buffers_stay_within_the_stated_memory(results: list[dict[str, Any]]) -> None:
    kv = 256 // WORLD * 2 * (8 + 12) * 4
    shards = {"ring": 2, "all_gather": WORLD, "hierarchical": 2 * NODE + 2, "nested_ring": 5}
    for number, case in enumerate(COUNTED):
        if case.schedule in shards:
            for r in results:
                assert 0 < r["buffers"][number] <= shards[case.schedule] * kv, case.schedule


@pytest.mark.parametrize("number", range(len(COUNTED)))
def test_fp32(results: list[dict[str, Any]], number: int) -> None:
    assert max(errors(COUNTED[number], [r["counted"][number] for r in results]).values()) <= 1e-5


@pytest.mark.parametrize("number", range(len(BF16)))
def test_bf16_error_is_that_of_one_device(results: list[dict[str, Any]], number: int) -> None:
    """Partial results are wide, so that four ranks lose no more than one."""
    case = BF16[number]
    alone = errors(case, [run_case(replace(case, schedule="ring"), None, 0, 1)])
    shared = errors(case, [r["bf16"][number] for r in results])
    for name in ("out", "dq", "dk", "dv"):
        assert shared[name] <= 1.5 * alone[name] + 1e-3, (name, shared, alone)
    assert shared["lse"] <= 1e-5


def test_auto_is_exact_and_chosen_once(results: list[dict[str, Any]]) -> None:
    for number, case in enumerate(AUTO):
        assert max(errors(case, [r["auto"][number] for r in results]).values()) <= 1e-5


def test_bad_input_is_refused_alike_on_all_ranks(results: list[dict[str, Any]]) -> None:
    by_rank = [r["errors"] for r in results]
    expected = {
        "node size": "node_size=3 must divide",
        "no node size": "node_size=None must be given",
        "halo": "schedule=",
        "name": "must be one of",
        "one rank's layout": "layout=",
        "one rank's index": "index=",
        "one rank's schedule": "schedule=",
        "block": "index.block",
        "documents": "doc_ids.shape",
        "profile": "profile.device",
        "one rank's length": "found on rank 1",
    }
    for name, text in expected.items():
        for found in by_rank:
            assert text in found[name], (name, found.get(name))
        assert len({found[name] for found in by_rank}) == 1


def test_calibration_is_equal_on_all_ranks(results: list[dict[str, Any]]) -> None:
    profiles = [r["profile"] for r in results]
    assert all(p == profiles[0] for p in profiles)
    assert profiles[0]["node_size"] == NODE
    for name in ("kernel_tflops", "step_s", "memory_gb_s", "backward_factor"):
        assert profiles[0][name] > 0
    assert profiles[0]["in_node"]["gb_s"] > 0
