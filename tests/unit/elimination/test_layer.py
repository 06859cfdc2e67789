"""The layer with elimination equals dense attention with masks, in fp64, for every mode."""

import itertools
from dataclasses import replace

import pytest
import torch
from support.elimination import (
    BLOCK,
    compare,
    definition,
    make_context,
    make_elimination,
    make_model,
    token_mask,
    visible,
)

from ltrain.attention import patterns
from ltrain.elimination import select_blocks
from ltrain.parallel.mesh import init_mesh, init_process_group

MODES = ("qkv", "q", "layer", "backward")
SCORES = torch.rand(9, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def mesh():
    init_process_group(60)
    return init_mesh()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def _layer(folder, mesh, elimination, variant="llama", **arguments):
    model = make_model(folder / variant, mesh, elimination, variant=variant, **arguments)
    return model.decoder.layers[1].train()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_tokens", [72, 67])
def test_equals_dense_attention_with_masks(mode, num_tokens, mesh, folder):
    elimination = make_elimination(SCORES, mode=mode, ratio=0.4)
    layer = _layer(folder, mesh, elimination)
    context = make_context(num_tokens)
    always = torch.zeros(9, dtype=torch.bool)
    always[8] = num_tokens % BLOCK != 0
    kept = select_blocks(SCORES[None], 0.4, strata=2, always=always)[0]
    compare(layer, context, token_mask(kept, num_tokens), mode, num_tokens)
    assert 0 < context.eliminated[1][0] < 1


@pytest.mark.parametrize("mode", MODES)
def test_documents_that_are_not_aligned(mode, mesh, folder):
    docs = torch.repeat_interleave(torch.tensor([0, 1, 2, 3, -1]), torch.tensor([21, 3, 30, 10, 8]))
    layer = _layer(folder, mesh, make_elimination(SCORES, mode=mode, ratio=0.3))
    context = make_context(72, docs)
    # Documents meet in blocks 2 and 6; block 8 is padding; the others are 0 1 | 3 4 5 | 7.
    best = [int(SCORES[:2].argmax()), 3 + int(SCORES[3:6].argmax())]
    kept = torch.tensor(sorted({2, 6, 7, *best}))
    compare(layer, context, token_mask(kept, 72), mode, 72)


@pytest.mark.parametrize("variant", ["llama-mha-bias", "qwen3"])
def test_other_families(variant, mesh, folder):
    layer = _layer(folder, mesh, make_elimination(SCORES, ratio=0.4), variant)
    kept = select_blocks(SCORES[None], 0.4, strata=2)[0]
    compare(layer, make_context(72), token_mask(kept, 72), "qkv", 72)


@pytest.mark.parametrize("mode", ["qkv", "q"])
@pytest.mark.parametrize("which", ["pattern", "model"])
def test_windows_go_by_original_distances(mode, which, mesh, folder):
    variant = "mistral-window" if which == "model" else "llama"
    window = patterns.sliding_window(window=2 * BLOCK) if which == "pattern" else None
    layer = _layer(folder, mesh, make_elimination(SCORES, mode=mode, ratio=0.4), variant, pattern=window)
    context = make_context(72)
    kept = select_blocks(SCORES[None], 0.4, strata=2)[0]
    if which == "pattern":
        blocks = patterns.sliding_window(window=2 * BLOCK).index(num_tokens=72, num_kv_heads=2, block=BLOCK)
        wide = blocks.to_mask()[0, 0].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        mask = visible(context) & wide
    else:
        mask = visible(context, window=7)
    compare(layer, context, token_mask(kept, 72), mode, 72, mask)


def test_smaller_blocks_than_the_layouts(mesh, folder):
    scores = torch.rand(18, generator=torch.Generator().manual_seed(4))
    layer = _layer(folder, mesh, make_elimination(scores, block=4, ratio=0.4))
    context = make_context(72)
    x = torch.zeros(72, 1, 32, dtype=torch.float64)
    layer(x, packed_seq_params=context)
    kept = torch.from_numpy(context.cached(("kept", 1), lambda: None).blocks)
    assert len(kept) == 6 and (torch.bincount(kept // 2 % 2, minlength=2) == 3).all()
    compare(layer, make_context(72), token_mask(kept, 72, 4), "qkv", 72)


@pytest.mark.parametrize("mode", MODES)
def test_dropped_rows_pass_untouched(mode, mesh, folder):
    layer = _layer(folder, mesh, make_elimination(SCORES, mode=mode, ratio=0.4))
    kept = token_mask(select_blocks(SCORES[None], 0.4, strata=2)[0], 72)
    context = make_context(72)
    make = torch.Generator().manual_seed(8)
    x = torch.randn(72, 1, 32, generator=make, dtype=torch.float64).requires_grad_()
    upstream = torch.randn(x.shape, generator=make, dtype=torch.float64)
    if mode == "layer":
        out, _ = layer(x, packed_seq_params=context)
    else:
        inputs = layer._inputs(x.detach(), context)
        half = {"qkv": layer._kept, "q": layer._asking, "backward": layer._exact_forward}[mode]
        out, _ = half(x, inputs, layer.elimination.choose(1, inputs))
    out.backward(upstream)
    if mode == "q":
        # Dropped tokens are still keys: only their own row is that of the residual.
        assert torch.equal(out[~kept], x[~kept])
        return
    assert torch.equal(x.grad[~kept], upstream[~kept])
    if mode != "backward":
        assert torch.equal(out[~kept], x[~kept])
    grads = {name: p.grad.clone() for name, p in layer.self_attention.named_parameters()}
    layer.zero_grad()
    other = x.detach().clone()
    other[~kept] += 1.0
    other.requires_grad_()
    fresh = make_context(72)
    if mode == "layer":
        again, _ = layer(other, packed_seq_params=fresh)
    else:
        inputs = layer._inputs(other.detach(), fresh)
        again, _ = half(other, inputs, layer.elimination.choose(1, inputs))
    again.backward(upstream)
    if mode == "backward":
        return
    assert torch.equal(again[kept], out[kept])
    for name, p in layer.self_attention.named_parameters():
        assert torch.equal(p.grad, grads[name]), name


def test_positions_are_those_of_the_whole_sequence(mesh, folder, monkeypatch):
    scores = torch.zeros(9)
    scores[[0, 7]] = 1.0
    layer = _layer(folder, mesh, make_elimination(scores, ratio=0.4))
    x = torch.randn(72, 1, 32, dtype=torch.float64)
    out, _ = layer(x, packed_seq_params=make_context(72))
    inner = layer.elimination.excerpt

    def renumbered(inputs, choice):
        made = inner(inputs, choice)
        made.excerpt = replace(made.excerpt, rows=torch.arange(len(made.rope_positions)))
        return made

    monkeypatch.setattr(layer.elimination, "excerpt", renumbered)
    wrong, _ = layer(x, packed_seq_params=make_context(72))
    assert (out - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_ratio_one_is_the_stock_model_bit_for_bit(mode, mesh, folder):
    found = []
    for elimination in (None, make_elimination(mode=mode, ratio=1.0)):
        model = make_model(folder / "llama", mesh, elimination)
        tokens = torch.arange(40)[None] % 131
        before = torch.get_rng_state()
        logits = model(input_ids=tokens, position_ids=None, attention_mask=None,
                       packed_seq_params=make_context(40))  # fmt: skip
        loss = logits.square().mean()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), before)
        found.append((loss.detach(), [p.grad for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_keeping_all_blocks_equals_dense(mode, mesh, folder):
    # A ratio below 1 and all blocks forced: the sparse path at the dense setting.
    elimination = make_elimination(SCORES, mode=mode, ratio=0.999, local_blocks=9)
    layer = _layer(folder, mesh, elimination)
    compare(layer, make_context(72), torch.ones(72, dtype=torch.bool), "qkv", 72)


def test_evaluation_is_dense(mesh, folder):
    layer = _layer(folder, mesh, make_elimination(SCORES, ratio=0.4)).eval()
    x = torch.randn(72, 1, 32, dtype=torch.float64)
    expected = definition(layer, x, make_context(72), torch.ones(72, dtype=torch.bool), "qkv")
    assert (layer(x, packed_seq_params=make_context(72))[0] - expected).abs().max() <= 1e-9


def test_the_ratio_rises_to_one():
    elimination = make_elimination(ratio=(0.4, 1.0), anneal=0.5)
    seen = []
    for step in range(10):
        elimination.step = step
        assert elimination.ratio(1) == 1.0
        seen.append(elimination.ratio(0))
    assert seen[:5] == [0.4] * 5 and seen[-1] == 1.0
    assert all(a < b for a, b in itertools.pairwise(seen[4:]))


@pytest.mark.parametrize("mode", ["qkv", "layer", "backward"])
def test_attention_saves_kept_rows_only(mode, mesh, folder):
    layer = _layer(folder, mesh, make_elimination(SCORES, mode=mode, ratio=0.4))
    context = make_context(72)
    x = torch.randn(72, 1, 32, dtype=torch.float64).requires_grad_()
    inputs = layer._inputs(x.detach(), context)
    choice = layer.elimination.choose(1, inputs)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        if mode == "layer":
            layer(x, packed_seq_params=context)
        else:
            {"qkv": layer._kept, "backward": layer._exact_forward}[mode](x, inputs, choice)
    assert saved and not [shape for shape in saved if 72 in shape]


def test_a_recomputation_takes_the_same_blocks(mesh, folder):
    from torch.utils.checkpoint import checkpoint

    from ltrain.elimination.scorers import Random

    found = []
    for again in (False, True):
        layer = _layer(folder, mesh, make_elimination(scorer=Random(), ratio=0.4))
        context = make_context(72)
        x = torch.ones(72, 1, 32, dtype=torch.float64).requires_grad_()
        run = lambda x, layer=layer, context=context: layer(x, packed_seq_params=context)[0]  # noqa: E731
        out = checkpoint(run, x, use_reentrant=False) if again else run(x)
        out.square().sum().backward()
        found.append((out.detach(), x.grad, [p.grad for p in layer.parameters()]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))
