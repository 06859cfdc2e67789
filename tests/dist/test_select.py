"""The selection over gloo is one process's selection, bit by bit; bad input is refused before an exchange."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.distributed import run_ranks

from ltrain.attention import patterns
from ltrain.attention.select import select_distributed
from ltrain.config.base import ConfigError
from ltrain.parallel.layout import SequenceLayout

T, BLOCK = 330, 16
SETTINGS = {
    "vertical_slash": {
        "observed": 20,
        "anchors": 2,
        "window": 20,
        "sinks": 3,
        "dense_below": 24,
        "max_verticals": 12,
        "max_slashes": 3,
        "slash_p": 0.6,
    },
    "xattention": {"stride": 8, "pool": 2, "threshold": 0.6},
    "block_topk": {"top_k": 4},
    "seer_gate": {"top_k": 4, "gate_dim": 8},
    "nsa": {"top_k": 6, "compress": 8},
    "s2": {"local_blocks": 2, "stride": 2},
}


def case(kind, dtype=torch.float32):
    torch.manual_seed(3)
    pattern = patterns.KINDS[kind](**SETTINGS[kind])
    module = pattern.make_module(num_heads=4, num_kv_heads=2, head_dim=8)
    q, k = (torch.randn(2, T, 4, 8) * 2).to(dtype), torch.randn(2, T, 2, 8).to(dtype)
    docs = torch.tensor([4] * 130 + [1] * 20 + [9] * 180)
    return pattern, module, q, k, docs


def alone(kind, dtype):
    pattern, module, q, k, docs = case(kind, dtype)
    arguments = {
        "num_tokens": T,
        "num_kv_heads": 2,
        "num_heads": 4,
        "block": BLOCK,
        "q": q,
        "k": k,
        "module": module,
    }
    return [pattern.index(doc_ids=d, **arguments) for d in (None, docs)]


def on_rank(rank, world_size, layouts, dtype):
    results: dict = {}
    # Of three ranks, a group of two whose numbers differ from the global ones.
    members = [2, 1] if world_size == 3 else list(range(world_size))
    group = dist.new_group(members)
    for kind in SETTINGS:
        pattern, module, q, k, docs = case(kind, dtype)
        for layout_kind in layouts:
            if rank not in members:
                continue
            layout = SequenceLayout(layout_kind, T, len(members), BLOCK)
            me = dist.get_rank(group)
            for packed, ids in ((False, None), (True, docs)):
                found = select_distributed(
                    pattern,
                    layout.shard(q, me, 1),
                    layout.shard(k, me, 1),
                    layout=layout,
                    group=group,
                    doc_ids=ids,
                    module=module,
                ).as_index()
                results[kind, layout_kind, packed] = (found.counts().numpy(), found.entries()[1].numpy())
    if rank in members:
        layout = SequenceLayout("striped", T, len(members), BLOCK)
        # Nothing to watch: empty exchanges, and every document is dense.
        shard = layout.shard(torch.zeros(1, T, 2, 8), dist.get_rank(group), 1)
        short_only = patterns.vertical_slash(dense_below=T)
        found = select_distributed(short_only, shard, shard, layout=layout, group=group)
        results["dense"] = found.index.nnz == layout.num_blocks * (layout.num_blocks + 1)
        short = torch.zeros(1, 7, 4, 8)
        try:
            select_distributed(patterns.block_topk(), short, short, layout=layout, group=group)
            results["refused"] = False
        except ConfigError:
            results["refused"] = True
    return results


@pytest.mark.parametrize(
    ("world_size", "layouts", "dtype"),
    [
        (2, ("striped", "zigzag"), torch.float32),
        (3, ("contiguous",), torch.bfloat16),
        (4, ("striped",), torch.float32),
    ],
)
def test_ranks_find_what_one_process_finds(world_size, layouts, dtype):
    wanted = {kind: alone(kind, dtype) for kind in SETTINGS}
    answers = [result for result in run_ranks(on_rank, world_size, layouts, dtype) if result]
    assert len(answers) == (4 if world_size == 4 else 2)
    for answer in answers:
        assert answer.pop("refused")
        assert answer.pop("dense")
        assert len(answer) == len(SETTINGS) * len(layouts) * 2
        for (kind, _, packed), (counts, columns) in answer.items():
            index = wanted[kind][int(packed)]
            assert np.array_equal(counts, index.counts().numpy()), kind
            assert np.array_equal(columns, index.entries()[1].numpy()), kind
