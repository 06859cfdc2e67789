"""vertical_slash: planted structure is found, published defects are absent, blocks and single keys count
once.
"""

import pytest
import torch

from ltrain.attention import patterns
from ltrain.attention.patterns import selected_attention
from ltrain_kernels.block_sparse import BlockIndex

BLOCK = 16


def find(pattern, q, k, docs=None):
    return pattern.select(
        num_tokens=q.shape[1],
        num_kv_heads=k.shape[2],
        num_heads=q.shape[2],
        block=BLOCK,
        doc_ids=docs,
        q=q,
        k=k,
    )


def planted(length=512, key_boost=(), dim=32):
    """Queries all along e0; keys of token j have logit `key_boost[j]` for every query, else about 0."""
    q = torch.zeros(1, length, 1, dim)
    q[..., 0] = dim**0.5
    k = torch.randn(1, length, 1, dim, generator=torch.Generator().manual_seed(0)) * 1e-3
    for token, logit in key_boost:
        k[0, token, 0, 0] = logit
    return q, k


def rule(**more):
    fields = {
        "observed": 32,
        "window": 16,
        "sinks": 0,
        "dense_below": 0,
        "max_verticals": 64,
        "max_slashes": 8,
        "vertical_p": 0.9,
        "slash_p": 0.9,
        "verticals": "tokens",
    }
    return patterns.vertical_slash(**{**fields, **more})


def test_a_key_that_alone_holds_the_share_is_kept():
    q, k = planted(key_boost=[(100, 14.0)])
    found = find(rule(), q, k)
    assert found.verticals.ids(0, 0).tolist() == [100]
    # It is no slash: beyond the window (two block diagonals) nothing else is active.
    offsets = {int(i) - int(j) for i, j in found.index.to_mask()[0, 0].nonzero()}
    assert offsets == {0, 1}


def test_sinks_and_diagonal_are_kept_whatever_is_seen():
    q, k = planted(key_boost=[(200, 20.0)])
    found = find(rule(sinks=3), q, k)
    assert found.verticals.ids(0, 0).tolist() == [0, 1, 2, 200]
    mask = found.index.to_mask()[0, 0]
    assert bool(mask.diagonal().all())


def test_caps_are_kept_and_the_heaviest_win():
    boost = [(50 + 10 * n, 8.0 + 0.2 * n) for n in range(20)]
    q, k = planted(key_boost=boost)
    found = find(rule(max_verticals=5, vertical_p=1.0, slash_p=0.1), q, k)
    assert found.verticals.ids(0, 0).tolist() == [50 + 10 * n for n in range(15, 20)]


def test_a_planted_slash_is_found_for_rows_of_every_phase():
    length, distance = 512, 100
    # Position j has its own direction; query i points at key i - distance.
    k = torch.nn.functional.one_hot(torch.arange(length), length).float()[None, :, None]
    q = k.clone()
    q[:, distance:] = k[:, :-distance]
    q = q * 40.0 * length**0.5 / 4
    found = find(rule(observed=8), q, k)
    mask = found.index.to_mask()[0, 0]
    for i in range(distance, length):
        assert bool(mask[i // BLOCK, (i - distance) // BLOCK])
    assert found.verticals.counts.sum() == 0
    # Bins 6 and so diagonals 6 and 7, beside the window's 0 and 1.
    assert {int(i) - int(j) for i, j in mask.nonzero()} == {0, 1, 6, 7}


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_statistics_are_the_attention_of_the_observed_queries(heads):
    torch.manual_seed(0)
    length, share = 256, 0.6
    q, k = torch.randn(1, length, 4, 16) * 3, torch.randn(1, length, 2, 16)
    q[..., 0] += 6
    k[:, 40, :, 0] += 4
    found = find(rule(heads=heads, vertical_p=share, slash_p=0.01, max_verticals=200, observed=20), q, k)
    logits = torch.einsum("thd,shd->hts", q[0].double(), k[0].repeat_interleave(2, 1).double()) / 4
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    attention = logits.masked_fill(~visible, -torch.inf).softmax(-1)[:, -20:]
    blocks = torch.arange(length) // BLOCK
    near = blocks[-20:, None] - blocks[None] < 2
    mass = attention.unflatten(0, (2, 2)).sum(1) if heads == "kv" else attention
    for head in range(mass.shape[0]):
        total = mass[head].sum()
        score = (mass[head] * ~near).sum(0)
        need = share * total - (mass[head] * near).sum()
        order = score.argsort(descending=True)
        count = int(((score[order].cumsum(0) - score[order]) < need).sum())
        far = mass[head] * ~near
        heavy = 4 * (far > 4 * total / 20 / 200).sum(0) >= 20
        passing = (4 * far.amax(0) > score) & ~heavy
        chosen = torch.zeros(length, dtype=torch.bool)
        chosen[order[:count]] = True
        wanted = set((chosen & ~passing | heavy).nonzero()[:, 0].tolist())
        assert passing.any()
        assert heavy.any()
        assert set(found.verticals.ids(0, head).tolist()) == wanted


def test_short_documents_are_dense_and_long_ones_have_windows_of_their_own():
    docs = torch.tensor([0] * 40 + [1] * 200 + [2] * 272)
    q, k = planted(key_boost=[(60, 14.0), (300, 14.0)])
    found = find(rule(dense_below=64), q, k, docs)
    assert found.verticals.ids(0, 0).tolist() == [60, 300]
    mask = found.index.to_mask()[0, 0]
    assert bool(mask[2, :3].all())
    assert not bool(mask[20:, :15].any())


def token_mask(selection, length, docs=None):
    """A(i) from its definition, bool [B, Hs, T, T]."""
    index, verticals = selection.index, selection.verticals
    blocks = index.to_mask().repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[..., :length, :length]
    keep = (blocks | verticals.mask[:, :, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    if docs is not None:
        docs = docs.expand(len(keep), length)
        keep = keep & (docs[:, None, :, None] == docs[:, None, None, :])
    return keep


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", ["kv", "query"])
def test_blocks_and_keys_are_attended_once_forward_and_backward(heads, packed):
    torch.manual_seed(0)
    length, batch = 150, 2
    docs = torch.tensor([[3] * 45 + [1] * 105, [0] * 100 + [2] * 50]) if packed else None
    q = (torch.randn(batch, length, 4, 8, dtype=torch.float64) * 2).requires_grad_()
    k = torch.randn(batch, length, 2, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(batch, length, 2, 6, dtype=torch.float64, requires_grad=True)
    pattern = rule(heads=heads, max_verticals=12, max_slashes=1, slash_p=0.4, observed=12, sinks=2)
    found = find(pattern, q, k, docs)
    assert found.verticals.counts.min() >= 2
    # The case that is easy to get wrong: a vertical inside an active block of some later row.
    tiles = found.verticals.tiles(found.index, tile=4)
    assert tiles.index.nnz > 0

    out, lse = selected_attention(q, k, v, found, doc_ids=docs, tiles=tiles, backend="reference")
    (out.sin().sum() + lse.cos().sum()).backward()
    got = [out, lse, q.grad, k.grad, v.grad]

    keep = token_mask(found, length, docs).repeat_interleave(4 // found.index.heads, 1)
    ref = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    wide = [x.repeat_interleave(2, 2) for x in ref[1:]]
    logits = torch.einsum("bthd,bshd->bhts", ref[0], wide[0]) * 8**-0.5
    logits = logits.masked_fill(~keep, -torch.inf)
    want_out = torch.einsum("bhts,bshd->bthd", logits.softmax(-1), wide[1])
    want_lse = logits.logsumexp(-1)
    (want_out.sin().sum() + want_lse.cos().sum()).backward()
    # The merge is fp32 by contract, so that is the precision of the whole.
    for name, a, b in zip(
        ["out", "lse", "dq", "dk", "dv"], got, [want_out, want_lse, *(x.grad for x in ref)], strict=True
    ):
        error = float((a - b).norm() / b.norm())
        assert error < 1e-6, (name, error)


def test_rounding_up_covers_every_key_and_nothing_is_lost():
    torch.manual_seed(0)
    q, k = torch.randn(1, 200, 2, 8) * 2, torch.randn(1, 200, 2, 8)
    docs = torch.tensor([0] * 90 + [1] * 110)
    exact = find(rule(max_verticals=12, slash_p=0.3), q, k, docs)
    rounded = find(rule(max_verticals=12, slash_p=0.3, verticals="blocks"), q, k, docs)
    assert rounded.verticals is None
    blocks = (
        BlockIndex.to_mask(rounded.index)
        .repeat_interleave(BLOCK, 2)
        .repeat_interleave(BLOCK, 3)[..., :200, :200]
    )
    wanted = token_mask(exact, 200, docs)
    assert bool((blocks | ~wanted).all())
    assert torch.equal(exact.as_index().entries()[1], rounded.index.entries()[1])


def test_selection_is_a_constant():
    q, k = (torch.randn(1, 64, 1, 8, requires_grad=True) for _ in range(2))
    found = find(rule(), q, k)
    assert not found.index.col.requires_grad
    assert not found.verticals.mask.requires_grad
