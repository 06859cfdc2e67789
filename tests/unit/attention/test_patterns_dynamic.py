"""Dynamic patterns: the index is one process's on any number of ranks, and the choices are those of the
definition.
"""

import pytest
import torch
from support.lockstep import places, run_lockstep

from ltrain.attention import patterns
from ltrain.attention.patterns.pooling import keep_share, keep_top_k
from ltrain.parallel.layout import SequenceLayout

T, BLOCK = 330, 16
DOCS = torch.tensor([4] * 130 + [1] * 20 + [2] * 7 + [9] * 173)
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
    "block_topk": {"top_k": 4, "sink_blocks": 1},
    "seer_gate": {"top_k": 4, "gate_dim": 8},
    "nsa": {"top_k": 6, "compress": 8, "window": 40},
}


def inputs(batch=1, heads=4, kv_heads=2, dim=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, T, heads, dim, generator=generator) * 2
    return q.to(dtype), torch.randn(batch, T, kv_heads, dim, generator=generator).to(dtype)


def find(pattern, q, k, docs=None, module=None, **more):
    return pattern.select(
        num_tokens=q.shape[1],
        num_kv_heads=k.shape[2],
        num_heads=q.shape[2],
        block=BLOCK,
        doc_ids=docs,
        q=q,
        k=k,
        module=module,
        **more,
    )


def find_on_ranks(pattern, q, k, layout, docs=None, module=None, counter=None):
    shape = pattern.shape_of(
        num_tokens=q.shape[1],
        num_kv_heads=k.shape[2],
        num_heads=q.shape[2],
        block=BLOCK,
        doc_ids=docs,
        layer=0,
        num_layers=None,
        q=q,
        kv_head_offset=0,
        total_kv_heads=None,
        device=None,
    )
    with torch.no_grad():
        searches = [
            pattern.steps(
                layout.shard(q, place.rank, 1), layout.shard(k, place.rank, 1), shape, place, module
            )
            for place in places(layout)
        ]
        return run_lockstep(searches, counter)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_any_number_of_ranks_finds_the_same_index(kind, packed):
    pattern = patterns.KINDS[kind](**SETTINGS[kind])
    torch.manual_seed(1)
    module = pattern.make_module(num_heads=4, num_kv_heads=2, head_dim=8)
    docs = torch.stack([DOCS, DOCS.flip(0)]) if packed else None
    q, k = inputs(batch=2)
    alone = find(pattern, q, k, docs, module).as_index()
    for world_size, layout in ((2, "striped"), (3, "contiguous"), (5, "zigzag"), (23, "striped")):
        counter = []
        found = find_on_ranks(
            pattern, q, k, SequenceLayout(layout, T, world_size, BLOCK), docs, module, counter
        )
        for selection in found:
            index = selection.as_index()
            assert torch.equal(index.counts(), alone.counts())
            assert torch.equal(index.entries()[1], alone.entries()[1])
        assert len(counter) == pattern.capabilities.collectives


@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_every_choice_holds_the_diagonal_the_first_block_and_no_other_document(kind):
    pattern = patterns.KINDS[kind](**SETTINGS[kind])
    module = pattern.make_module(num_heads=4, num_kv_heads=2, head_dim=8)
    q, k = inputs()
    index = find(pattern, q, k, DOCS, module).as_index()
    mask = index.to_mask()[0]
    first = [int((DOCS[row * BLOCK] == DOCS).nonzero()[0]) // BLOCK for row in range(mask.shape[-1])]
    for row in range(mask.shape[-1]):
        assert bool(mask[:, row, row].all())
        assert bool(mask[:, row, first[row]].all())
        assert not bool(mask[:, row, : first[row]].any())
        assert not bool(mask[:, row, row + 1 :].any())
    assert 0 < pattern.density(index, num_tokens=T, doc_ids=DOCS) < 1


@pytest.mark.parametrize("kind", ["vertical_slash", "xattention", "block_topk"])
def test_query_heads_choose_for_themselves(kind):
    pattern = patterns.KINDS[kind](**SETTINGS[kind], heads="query")
    q, k = inputs(heads=4, kv_heads=2)
    index = find(pattern, q, k).as_index()
    assert index.heads == 4
    # A query head's choice is what it would choose if it were alone on its key/value head.
    for head in range(4):
        one = find(pattern, q[:, :, head : head + 1], k[:, :, head // 2 : head // 2 + 1]).as_index()
        assert torch.equal(one.to_mask()[0, 0], index.to_mask()[0, head])


def test_packing_does_not_change_a_documents_choice():
    pattern = patterns.block_topk(top_k=3)
    q, k = inputs()
    docs = (torch.arange(T) >= 160).long()
    packed = find(pattern, q, k, docs).as_index().to_mask()
    alone = find(pattern, q[:, 160:], k[:, 160:]).as_index().to_mask()
    assert torch.equal(packed[:, :, 10:, 10:], alone)


def test_block_topk_is_the_mean_gate():
    q, k = inputs(heads=2, kv_heads=2)
    mask = find(patterns.block_topk(top_k=4, sink_blocks=1), q, k).as_index().to_mask()[0]
    row = 15
    queries = q[0, row * BLOCK : (row + 1) * BLOCK].double()
    means = torch.stack([k[0, c * BLOCK : (c + 1) * BLOCK].double().mean(0) for c in range(row)])
    gate = torch.einsum("thd,chd->hc", queries, means)
    gate[:, 0] = torch.inf
    for head in range(2):
        wanted = set(gate[head].topk(3).indices.tolist()) | {row}
        assert set(mask[head, row].nonzero()[:, 0].tolist()) == wanted


def test_xattention_pool_one_is_the_published_score():
    q, k = inputs(heads=1, kv_heads=1)
    stride, share = 8, 0.7
    mask = find(patterns.xattention(stride=stride, pool=1, threshold=share), q, k).as_index().to_mask()[0, 0]
    row = 12
    tiles_q = q[0, row * BLOCK : (row + 1) * BLOCK, 0].double().view(-1, stride, 8)
    tiles_k = k[0, : (row + 1) * BLOCK, 0].double().view(-1, stride, 8)
    logits = torch.einsum("msd,nsd->mn", tiles_q.flip(1), tiles_k) / (stride * 8**0.5)
    place = torch.arange(len(tiles_k))[None] > torch.arange(2)[:, None] + row * BLOCK // stride
    score = logits.masked_fill(place, -torch.inf).softmax(-1).view(2, row + 1, 2).sum((0, 2))
    kept = {0, row}
    for column in score.argsort(descending=True).tolist():
        if score[list(kept)].sum() >= share * score.sum():
            break
        kept.add(column)
    assert set(mask[row].nonzero()[:, 0].tolist()) == kept


def test_nsa_importance_is_the_attention_to_compressed_keys():
    pattern = patterns.nsa(top_k=6, compress=8, local_blocks=2, sink_blocks=1)
    module = pattern.make_module(num_heads=4, num_kv_heads=2, head_dim=8)
    torch.nn.init.normal_(module.key_weight)
    q, k = inputs()
    mask = find(pattern, q, k, module=module).as_index().to_mask()[0]
    row = 14
    weight = module.key_weight.softmax(-1).detach().double()
    means = torch.einsum("nrhd,hr->nhd", k[0, : row * BLOCK].double().view(-1, 8, 2, 8), weight)
    for head in range(2):
        queries = q[0, row * BLOCK : (row + 1) * BLOCK, 2 * head : 2 * head + 2].double()
        share = (torch.einsum("tgd,nd->tgn", queries, means[:, head]) * 8**-0.5).softmax(-1).sum((0, 1))
        score = share.view(row, -1).sum(-1)
        score[[0, row - 1]] = torch.inf
        wanted = set(score.topk(5).indices.tolist()) | {row}
        assert set(mask[head, row].nonzero()[:, 0].tolist()) == wanted


def test_share_includes_the_crossing_block_and_top_k_counts_the_forced():
    scores = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.04]])
    assert keep_share(scores, [4], 0.5).tolist() == [[True, False, False, False, True]]
    assert keep_share(scores, [4], 0.8).tolist() == [[True, True, False, False, True]]
    assert keep_share(scores, [0], 0.4).tolist() == [[True, False, False, False, False]]
    assert keep_share(scores, [0], 1.0).all()
    assert keep_top_k(scores, [4], 3).tolist() == [[True, True, False, False, True]]
    assert keep_top_k(scores, [1, 4], 2).tolist() == [[False, True, False, False, True]]
    assert keep_top_k(torch.zeros(1, 5), [4], 3).tolist() == [[True, True, False, False, True]]


def test_attention_mass_is_the_kept_share_of_the_softmax():
    q, k = inputs()
    pattern = patterns.sliding_window(window=40, sinks=2)
    index = pattern.index(num_tokens=T, num_kv_heads=2, num_heads=4, block=BLOCK, doc_ids=DOCS)
    logits = torch.einsum("thd,shd->hts", q[0].double(), k[0].repeat_interleave(2, 1).double()) * 8**-0.5
    visible = torch.ones(T, T, dtype=torch.bool).tril() & (DOCS[:, None] == DOCS[None])
    kept = index.to_mask()[0, 0].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:T, :T]
    probability = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    wanted = (probability * kept).sum(-1).mean(-1)
    got = patterns.attention_mass(q, k, index, doc_ids=DOCS)[0].double()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    everything = patterns.dense().index(num_tokens=T, num_kv_heads=2, block=BLOCK)
    assert patterns.attention_mass(q, k, everything, row_blocks=[0, 7]).min() > 1 - 1e-6
