"""Static patterns against their definition, token by token, and what a user gets for bad input."""

import warnings

import pytest
import torch

from ltrain.attention import patterns
from ltrain.config.base import ConfigError
from ltrain.config.load import parse_yaml
from ltrain.config.patterns import PatternConfig, SlidingWindowFields

T, BLOCK = 210, 16
N = -(-T // BLOCK)
DOCS = torch.tensor([7] * 50 + [2] * 6 + [9] * 100 + [3] * 54)


def token_mask(index, docs=None):
    """What the kernel would let through: bool [B, H, T, T]."""
    mask = index.to_mask().repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[..., :T, :T]
    mask = mask & torch.ones(T, T, dtype=torch.bool).tril()
    return mask if docs is None else mask & (docs[:, None] == docs[None])


def causal(docs=None):
    full = torch.ones(T, T, dtype=torch.bool).tril()
    return full if docs is None else full & (docs[:, None] == docs[None])


def build(pattern, docs=None, **more):
    return pattern.index(num_tokens=T, num_kv_heads=4, num_heads=8, block=BLOCK, doc_ids=docs, **more)


@pytest.mark.parametrize("docs", [None, DOCS])
def test_dense_is_everything_in_the_document(docs):
    index = build(patterns.dense(), docs)
    assert torch.equal(token_mask(index, docs)[0, 0], causal(docs))
    assert patterns.dense().density(index, num_tokens=T, doc_ids=docs) == 1.0


@pytest.mark.parametrize("docs", [None, DOCS])
@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (16, 1), (17, 5), (40, 20), (1000, 0)])
def test_sliding_window_keeps_window_and_sinks_and_little_more(docs, window, sinks):
    pattern = patterns.sliding_window(window=window, sinks=sinks)
    index = build(pattern, docs)
    got = token_mask(index, docs)[0, 0]
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    start = (
        torch.tensor([int((d == DOCS).nonzero()[0]) for d in DOCS])
        if docs is not None
        else torch.zeros(T).long()
    )
    wanted = causal(docs) & ((i - j < window) | (j < start[:, None] + sinks))
    assert bool((got | ~wanted).all())
    # Rounding up: nothing beyond the blocks that hold a wanted pair of some query of the row.
    near = (i // BLOCK - j // BLOCK) <= -(-(window - 1) // BLOCK)
    sink_block = (sinks > 0) & (j // BLOCK <= (start[:, None] + sinks - 1) // BLOCK)
    assert torch.equal(got, causal(docs) & (near | sink_block))
    share = float(got.sum()) / float(causal(docs).sum())
    assert pattern.density(index, num_tokens=T, doc_ids=docs) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("docs", [None, DOCS])
def test_s2_follows_its_formula_by_global_head(docs):
    pattern = patterns.s2(local_blocks=2, stride=4, head_offset=1, dense_heads=1)
    got = token_mask(build(pattern, docs), docs)[0]
    i, j = torch.arange(N)[:, None], torch.arange(N)[None]
    for head in range(4):
        blocks = (j <= i) & ((i - j < 2) | ((j + head + 1) % 4 == 0) | (torch.tensor(head >= 3)))
        wanted = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:T, :T] & causal(docs)
        assert torch.equal(got[head], wanted)
    # A rank with two of the heads has those two rows of the whole.
    part = pattern.index(
        num_tokens=T,
        num_kv_heads=2,
        num_heads=4,
        block=BLOCK,
        doc_ids=docs,
        kv_head_offset=2,
        total_kv_heads=4,
    )
    assert torch.equal(part.to_mask(), build(pattern, docs).to_mask()[:, 2:])


def test_s2_warns_unless_the_heads_cover_the_context():
    with pytest.warns(UserWarning, match="seen by no head"):
        build(patterns.s2(local_blocks=1, stride=16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        union = build(patterns.s2(local_blocks=1, stride=4)).to_mask()[0].any(0)
        build(patterns.s2(local_blocks=1, stride=16, dense_heads=1))
    assert torch.equal(union, torch.ones(N, N, dtype=torch.bool).tril())


def test_longgen_is_dense_in_the_middle_third():
    pattern = patterns.longgen(sparse=SlidingWindowFields(window=16))
    counts = [build(pattern, layer=layer, num_layers=9).nnz for layer in range(9)]
    assert [count == N * (N + 1) // 2 for count in counts] == [False] * 3 + [True] * 3 + [False] * 3
    with pytest.raises(ConfigError, match="num_layers"):
        build(pattern, layer=0)
    assert patterns.longgen(full_layers=(1,)).is_dense_layer(1)


@pytest.mark.parametrize("kind", sorted(patterns.KINDS))
def test_dense_layers_are_dense_for_every_pattern(kind):
    index = build(patterns.KINDS[kind](dense_layers=(2,)), DOCS, layer=2, num_layers=6)
    assert torch.equal(token_mask(index, DOCS)[0, 0], causal(DOCS))


def test_each_sequence_of_a_batch_has_its_own_documents():
    both = torch.stack([DOCS, DOCS.flip(0)])
    for pattern in (
        patterns.dense(),
        patterns.sliding_window(window=20, sinks=3),
        patterns.s2(local_blocks=1, stride=4),
    ):
        index = build(pattern, both)
        assert index.batch == 2
        for b in range(2):
            assert torch.equal(index.to_mask()[b], build(pattern, both[b]).to_mask()[0])


def test_yaml_section_to_pattern():
    from pydantic import TypeAdapter

    tree = parse_yaml("kind: s2\nlocal_blocks: 8\nstride: 4\ndense_layers: [0, 1]\n", "text")
    pattern = patterns.from_config(TypeAdapter(PatternConfig).validate_python(tree))
    assert isinstance(pattern, patterns.s2)
    assert (pattern.stride, pattern.dense_layers) == (4, (0, 1))
    assert {kind: cls.static for kind, cls in patterns.KINDS.items()} == {
        "dense": True,
        "sliding_window": True,
        "s2": True,
        "longgen": True,
        "vertical_slash": False,
        "xattention": False,
        "block_topk": False,
        "seer_gate": False,
        "nsa": False,
    }


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: patterns.sliding_window(window=0), "window"),
        (lambda: patterns.sliding_window(windw=4), "windw"),
        (lambda: patterns.dense(dense_layers=(1, 1)), "dense_layers"),
        (lambda: patterns.xattention(stride=12), "stride"),
        (lambda: patterns.xattention(stride=8, pool=3), "pool"),
        (lambda: patterns.vertical_slash(slash_p=0.0), "slash_p"),
        (lambda: patterns.dense().index(num_tokens=8, num_kv_heads=3, num_heads=4), "num_heads"),
        (lambda: build(patterns.dense(), DOCS[:-1]), "doc_ids.shape"),
        (lambda: build(patterns.dense(), torch.tensor([0] * 100 + [1] * 100 + [0] * 10)), "doc_ids"),
        (lambda: build(patterns.dense(), DOCS.float()), "doc_ids.dtype"),
        (lambda: build(patterns.s2(), kv_head_offset=2), "total_kv_heads"),
        (lambda: build(patterns.s2(), kv_head_offset=6, total_kv_heads=8), "kv_head_offset"),
        (lambda: build(patterns.block_topk()), "q, k"),
        (lambda: build(patterns.block_topk(), q=torch.ones(1, T, 8, 4), k=torch.ones(1, T, 3, 4)), "k.shape"),
        (lambda: build(patterns.seer_gate(), q=torch.ones(1, T, 8, 4), k=torch.ones(1, T, 4, 4)), "module"),
        (
            lambda: build(patterns.xattention(stride=32), q=torch.ones(1, T, 8, 4), k=torch.ones(1, T, 4, 4)),
            "stride",
        ),
        (lambda: patterns.from_config(SlidingWindowFields.model_construct(kind="nope")), "kind"),
    ],
)
def test_bad_input_names_the_field(make, field):
    with pytest.raises(ConfigError) as caught:
        make()
    assert field in caught.value.field


def test_a_million_tokens_build_in_closed_form():
    index = patterns.s2(local_blocks=16, stride=8).index(num_tokens=1 << 20, num_kv_heads=8, block=64)
    assert index.nbytes < 10_000
    assert index.heads == 8
