"""Layouts by predicted work: striped where that is even, dealt longest first where it isn't."""

import numpy as np
import pytest
import torch

from ltrain.attention import patterns
from ltrain.attention.layout_choice import LayoutChoice
from ltrain.attention.work import deal_blocks, rank_imbalance
from ltrain.config.parallel import ContextSection
from ltrain.parallel.layout import SequenceLayout

BLOCK = 16


def choice(kind="auto", pattern=None, windows=(None, None)):
    section = ContextSection(layout=kind, block=BLOCK)
    return LayoutChoice(section, pattern or patterns.dense(), windows, num_kv_heads=2)


def test_one_long_document_is_striped_and_the_reason_is_told_once(caplog):
    caplog.set_level("INFO", logger="ltrain")
    rule = choice()
    for _ in range(2):
        layout = rule(BLOCK * 256, 4)
        assert layout == SequenceLayout("striped", BLOCK * 256, 4, BLOCK)
    assert [r.message for r in caplog.records] == [
        "layout of the first sequence: striped, the busiest rank has 1.012 x the mean work"
    ]


def test_documents_as_long_as_the_stripe_are_dealt_by_their_work(caplog):
    caplog.set_level("INFO", logger="ltrain")
    # Every document is four blocks: the rank that gets all last blocks would do 1.6 times the mean.
    docs = torch.arange(32).repeat_interleave(4 * BLOCK)
    rule = choice()
    layout = rule(len(docs), 4, docs)
    work = rule.row_work(len(docs), docs)
    assert work.tolist() == [2.0, 4.0, 6.0, 8.0] * 32
    assert layout.kind == "dealt" and rank_imbalance(work, layout) <= 1.05
    assert rank_imbalance(work, SequenceLayout("striped", len(docs), 4, BLOCK)) == 1.6
    assert sorted(np.bincount(layout.block_owner)) == [32] * 4
    assert "striped 1.600 x" in caplog.records[0].message


def test_kinds_that_are_named_are_taken_as_they_are():
    docs = torch.arange(32).repeat_interleave(4 * BLOCK)
    for kind in ("striped", "zigzag", "contiguous"):
        assert choice(kind)(len(docs), 4, docs).kind == kind
    assert choice("dealt")(BLOCK * 256, 4).kind == "dealt"
    assert choice("dealt")(BLOCK * 256, 1).kind == "striped"


def test_predicted_work_follows_pattern_and_window():
    def work(pattern, windows=(None, None)):
        return choice(pattern=pattern, windows=windows).row_work(20 * BLOCK).tolist()

    rows = np.arange(1.0, 21)
    assert work(patterns.sliding_window(window=BLOCK + 1)) == (2 * np.minimum(rows, 2)).tolist()
    assert work(patterns.block_topk(top_k=5)) == (2 * np.minimum(rows, 5)).tolist()
    assert work(patterns.block_topk(top_k=5, dense_layers=(1,))) == (np.minimum(rows, 5) + rows).tolist()
    assert work(patterns.vertical_slash()) == (2 * rows).tolist()
    assert work(patterns.dense(), (None, 2 * BLOCK)) == (rows + np.minimum(rows, 3)).tolist()
    # Two heads of a strided pattern: the mean of their rows.
    index = patterns.s2(local_blocks=1, stride=2).index(num_tokens=20 * BLOCK, num_kv_heads=2, block=BLOCK)
    assert work(patterns.s2(local_blocks=1, stride=2)) == (2 * index.counts()[0].double().mean(0)).tolist()


@pytest.mark.parametrize(("blocks", "ranks"), [(1, 4), (7, 3), (40, 7), (64, 8)])
def test_blocks_are_dealt_evenly_in_number(blocks, ranks):
    rng = np.random.default_rng(blocks)
    cost = rng.lognormal(0, 1.5, blocks)
    layout = deal_blocks(cost, SequenceLayout("striped", blocks * BLOCK - 3, ranks, BLOCK))
    counts = np.bincount(layout.block_owner, minlength=ranks)
    assert counts.sum() == blocks and counts.max() - counts.min() <= 1
