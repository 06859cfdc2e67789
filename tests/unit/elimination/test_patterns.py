"""Patterns found online, in a layer with elimination: dense attention with masks in original coordinates."""

import pytest
import torch
from support.elimination import (
    BLOCK,
    DOCUMENTS,
    FOUND,
    compare,
    make_context,
    make_elimination,
    make_model,
    token_mask,
    visible,
)

from ltrain.attention.rope import apply_rope
from ltrain.parallel.mesh import init_mesh, init_process_group

SCORES = torch.rand(12, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def mesh():
    init_process_group(60)
    return init_mesh()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def _mask(pattern, layer, context, kept, among_kept):
    """Bool [Hq, T, T] of the visible pairs that the pattern selects: found in the whole sequence, or in that
    of the kept tokens and put where they lie in the whole."""
    tokens = len(kept)
    x = torch.randn(tokens, 1, 32, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    attention = layer.self_attention
    tables = attention.core_attention.settings.rope.tables(context.rope_positions)
    q, k, _ = attention.get_query_key_value_tensors(layer.input_layernorm(x))  # x is that of `compare`
    q, k = (apply_rope(t.transpose(0, 1), *tables).detach() for t in (q, k))
    seen = kept if among_kept else torch.ones_like(kept)
    places = seen.nonzero()[:, 0]
    blocks = pattern.index(
        q=q[:, places], k=k[:, places], num_tokens=len(places), num_heads=q.shape[2], num_kv_heads=k.shape[2],
        block=BLOCK, doc_ids=context.doc_ids[places],
    ).to_mask()[0]  # fmt: skip
    wide = blocks.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, : len(places), : len(places)]
    mask = torch.zeros(q.shape[2], tokens, tokens, dtype=torch.bool)
    mask[:, places[:, None], places] = wide.repeat_interleave(q.shape[2] // len(wide), 0)
    return mask & visible(context)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("mode", ["qkv", "q", "layer", "backward"])
@pytest.mark.parametrize("name", FOUND)
def test_equals_dense_attention_with_masks(name, mode, documents, mesh, folder):
    pattern = FOUND[name]
    doc_ids, tokens = DOCUMENTS[documents]
    elimination = make_elimination(SCORES, mode=mode, ratio=0.5)
    level = "full" if documents == "packed" else "none"
    model = make_model(folder / "llama", mesh, elimination, pattern=pattern, memory_level=level)
    layer, context = model.decoder.layers[1].train(), make_context(tokens, doc_ids)
    x = torch.zeros(tokens, 1, 32, dtype=torch.float64)
    choice = elimination.choose(1, layer._inputs(x, make_context(tokens, doc_ids)))
    kept = token_mask(torch.from_numpy(choice.blocks), tokens)
    among_kept = mode in ("qkv", "layer") and not pattern.by_distance
    mask = _mask(pattern, layer, context, kept, among_kept)
    dense = (visible(context) & kept & kept[:, None]).sum()
    share = (mask & kept & kept[:, None]).sum() / (len(mask) * dense)
    assert 0.2 < share < 0.97, "the pattern must leave something out"
    compare(layer, context, kept, mode, tokens, mask)
