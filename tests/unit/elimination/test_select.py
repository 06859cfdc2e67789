"""`select_blocks`: sorted, distinct, deterministic, the same quota in every stratum."""

import numpy as np
import pytest
import torch

from ltrain.config.base import ConfigError
from ltrain.elimination import select_blocks


def _scores(batch, blocks, seed=0):
    return torch.rand(batch, blocks, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("blocks,ratio", [(16, 0.4), (33, 0.5), (7, 0.25), (1, 0.1), (64, 0.3)])
def test_the_best_blocks_are_kept_in_order(blocks, ratio):
    scores = _scores(3, blocks)
    kept = select_blocks(scores, ratio)
    count = max(1, int(ratio * blocks + 1e-9))
    assert kept.dtype == torch.int64 and kept.shape == (3, count)
    expected = scores.topk(count).indices.sort().values
    assert torch.equal(kept, expected)


def test_equal_scores_go_to_the_earlier_block():
    assert select_blocks(torch.ones(1, 10), 0.3).tolist() == [[0, 1, 2]]
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 0.0]])
    assert select_blocks(scores, 0.7).tolist() == [[0, 1, 2, 4]]


def test_ratio_one_keeps_everything_but_padding():
    docs = torch.tensor([0, 0, 1, 1, 1, -1, -1])
    assert select_blocks(_scores(1, 7), 1.0, strata=4, doc_of_block=docs).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("strata", [2, 4, 8])
@pytest.mark.parametrize("deal", ["striped", "contiguous"])
def test_every_stratum_keeps_the_same_quota(strata, deal):
    kept = select_blocks(_scores(1, 64), 0.4, strata=strata, deal=deal)[0].numpy()
    stratum = kept % strata if deal == "striped" else kept * strata // 64
    counts = np.bincount(stratum, minlength=strata)
    assert set(counts) == {int(0.4 * 64 / strata + 1e-9)}


@pytest.mark.parametrize("kind,deal", [("striped", "striped"), ("zigzag", "contiguous"), ("contiguous",) * 2])
@pytest.mark.parametrize("blocks", [64, 61])
def test_every_rank_holds_whole_strata(kind, deal, blocks):
    from ltrain.elimination.quotas import stratum_of_block
    from ltrain.parallel.layout import SequenceLayout

    stratum = stratum_of_block(blocks, 16, deal)
    for world in (1, 2, 4, 8):
        owner = SequenceLayout(kind, blocks * 8 - 3, world, 8).block_owner
        for s in range(16):
            assert len(set(owner[stratum == s])) <= 1, (kind, world, s)


def test_forced_blocks_are_kept_and_strata_stay_equal():
    always = torch.zeros(32, dtype=torch.bool)
    always[[0, 4, 8, 12, 31]] = True  # four of stratum 0
    kept = select_blocks(_scores(1, 32), 0.25, strata=4, always=always)[0]
    assert set(always.nonzero()[:, 0].tolist()) <= set(kept.tolist())
    assert np.bincount(kept.numpy() % 4).tolist() == [4, 4, 4, 4]


def test_documents_have_quotas_of_their_own():
    docs = torch.tensor([0] * 10 + [1] * 1 + [2] * 5 + [-1] * 2)
    scores = _scores(1, 18)
    scores[0, 10:] -= 10.0
    kept = select_blocks(scores, 0.4, doc_of_block=docs)[0]
    assert torch.bincount(docs[kept], minlength=3).tolist() == [4, 1, 2]


@pytest.mark.parametrize("strata", [1, 4])
def test_packed_documents_keep_what_each_keeps_alone(strata):
    lengths = [24, 3, 17, 8]
    scores = _scores(1, sum(lengths))
    docs = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    packed = select_blocks(scores, 0.4, strata=strata, doc_of_block=docs)[0].tolist()
    alone, start = [], 0
    for length in lengths:
        one = select_blocks(scores[:, start : start + length], 0.4, strata=strata)[0]
        alone += (one + start).tolist()
        start += length
    assert packed == alone


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    select_blocks(_scores(2, 16), 0.5, strata=2)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "arguments,says",
    [
        ({"ratio": 0.0}, "must lie in (0, 1]"),
        ({"ratio": 1.5}, "must lie in (0, 1]"),
        ({"ratio": float("nan")}, "must lie in (0, 1]"),
        ({"strata": 0}, "strata=0 must be at least 1"),
        ({"always": torch.zeros(3, dtype=torch.bool)}, "always.shape=(3,) must be [8] or [2, 8]"),
        ({"doc_of_block": torch.tensor([[0] * 8, [0, -1] * 4])}, "keep different counts"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    with pytest.raises(ConfigError) as caught:
        select_blocks(_scores(2, 8), **{"ratio": 0.5, **arguments})
    assert says in str(caught.value)


def test_scores_that_are_not_numbers_are_refused():
    with pytest.raises(ConfigError, match="must be numbers"):
        select_blocks(torch.tensor([[1.0, float("nan")]]), 0.5)
