"""Scorers against their definitions; packed documents against the same ones alone; resuming bit for bit."""

from pathlib import Path

import pytest
import torch
from support.elimination import BLOCK, make_context, make_elimination, make_model
from support.tiny import build, parameter_hash, tiny_tree, write_text

from ltrain.attention.rope import apply_rope
from ltrain.config.elimination import LemoScorer, PooledScorer
from ltrain.elimination.counter import random_scores
from ltrain.elimination.pooled import column_mass
from ltrain.elimination.scorers import Lemo, Pooled, Recency
from ltrain.parallel.mesh import init_mesh, init_process_group

DOCS = torch.repeat_interleave(torch.tensor([0, 1, 2]), torch.tensor([40, 16, 11]))


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    init_process_group(60)
    folder = tmp_path_factory.mktemp("models") / "llama"
    elimination = make_elimination(scorer=Recency(), ratio=0.4)
    return make_model(folder, init_mesh(), elimination).decoder.layers[1].train()


def _inputs(layer, num_tokens=67, docs=DOCS, seed=3):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 1, 32, generator=make, dtype=torch.float64)
    return layer._inputs(x, make_context(num_tokens, docs))


def _naive_mass(q, k, docs, scale):
    """q, k [N, H, D] means, docs [N]: a loop over rows and heads."""
    mass = torch.zeros(len(q), dtype=torch.float64)
    counts = torch.tensor([BLOCK] * (len(q) - 1) + [3.0], dtype=torch.float64)
    for row in range(len(q)):
        seen = [c for c in range(row + 1) if docs[c] == docs[row]]
        for head in range(q.shape[1]):
            key = k[seen, head * k.shape[1] // q.shape[1]]
            logits = key @ q[row, head] * scale + counts[seen].log()
            mass[seen] += logits.softmax(0)
    return mass


def test_pooled_is_the_column_mass_of_block_means(layer):
    inputs = _inputs(layer)
    norm, attention = layer.input_layernorm, layer.self_attention
    rope = attention.core_attention.settings.rope
    n = norm(inputs.x)
    docs = DOCS[::BLOCK]
    q, k, _ = attention.get_query_key_value_tensors(n)
    tables = rope.tables(inputs.context.rope_positions)
    means = []
    for x in (q, k):
        rotated = apply_rope(x.transpose(0, 1), *tables)[0]
        means.append(torch.stack([part.mean(0) for part in rotated.split(BLOCK)]))
    expected = _naive_mass(*means, docs, 8**-0.5)
    found = Pooled(PooledScorer(pool="tokens")).score(inputs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert found.sum().item() == pytest.approx(9 * 4, rel=1e-5)
    # Means of hidden states, projected, then rotated by the block's mean rotation.
    hidden = torch.stack([part.mean(0) for part in n[:, 0].split(BLOCK)])
    q, k, _ = attention.get_query_key_value_tensors(hidden.unsqueeze(1))
    cos, sin = (torch.stack([part.mean(0) for part in t.split(BLOCK)]) for t in tables)
    q, k = (apply_rope(x, cos[:, None], sin[:, None])[:, 0] for x in (q, k))
    expected = _naive_mass(q, k, docs, 8**-0.5)
    found = Pooled(PooledScorer()).score(inputs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_uniform_blocks_make_both_pools_one(layer):
    inputs = _inputs(layer)
    blocks = [part[:1].expand(len(part), -1, -1) for part in inputs.x.split(BLOCK)]
    same = layer._inputs(torch.cat(blocks), inputs.context)
    found = [Pooled(PooledScorer(pool=pool)).score(same) for pool in ("means", "tokens")]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_column_mass_in_pieces(monkeypatch):
    make = torch.Generator().manual_seed(0)
    q, k = torch.randn(11, 4, 8, generator=make), torch.randn(11, 2, 8, generator=make)
    low, weight = torch.tensor([0] * 6 + [6] * 5), torch.ones(11)
    whole = column_mass(q, k, low, weight, 0.3)
    monkeypatch.setattr("ltrain.elimination.pooled._ROWS", 3)
    torch.testing.assert_close(column_mass(q, k, low, weight, 0.3), whole)


@pytest.mark.parametrize("causal", [False, True])
def test_lemo_is_the_tile_maximum_before_rotation(layer, causal):
    inputs = _inputs(layer)
    q, k, _ = layer.self_attention.get_query_key_value_tensors(layer.input_layernorm(inputs.x))
    k = k.repeat_interleave(2, 2)
    pairs = torch.einsum("ibhd,jbhd->hij", q, k).relu().mean(0)
    pairs = pairs * (DOCS[:, None] == DOCS[None])
    pairs = pairs.tril() if causal else pairs
    tiles = [[tile.max() for tile in row.split(BLOCK, 1)] for row in pairs.split(BLOCK, 0)]
    expected = torch.tensor(tiles, dtype=torch.float64).sum(0)
    found = Lemo(LemoScorer(causal=causal)).score(inputs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_random_is_a_function_of_its_key():
    before = torch.get_rng_state()
    one = random_scores(50, 1, 2, 3, 4)
    assert torch.equal(one, random_scores(50, 1, 2, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    for other in ((2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)):
        assert not torch.equal(one, random_scores(50, *other))
    assert one.min() >= 0 and one.max() < 1 and 0.35 < one.mean() < 0.65


@pytest.mark.parametrize("mode", ["qkv", "q", "layer", "backward"])
def test_packed_documents_are_as_alone(layer, mode):
    elimination = make_elimination(scorer=Pooled(PooledScorer()), mode=mode, ratio=0.4)
    layer.elimination = elimination
    inputs = _inputs(layer)
    whole = inputs.x.clone().requires_grad_()
    out, _ = layer(whole, packed_seq_params=inputs.context)
    out.square().sum().backward()
    for doc in range(3):
        own = doc == DOCS
        x = inputs.x[own].clone().requires_grad_()
        alone, _ = layer(x, packed_seq_params=make_context(int(own.sum())))
        alone.square().sum().backward()
        torch.testing.assert_close(alone, out[own], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(x.grad, whole.grad[own], rtol=1e-8, atol=1e-8)


def test_a_resumed_run_draws_the_same_blocks(tmp_path):
    from ltrain.train.main import restore
    from ltrain.train.trainer import Trainer

    write_text(tmp_path / "text")

    def run(name, steps, resume=False):
        tree = tiny_tree(
            Path(tmp_path), run__name=name, train__steps=4, train__seq_len=256, train__tokens_per_step=512,
            elimination={"kind": "blocks", "ratio": 0.4, "strata": 2, "anneal": 0.5,
                         "scorer": {"kind": "random"}},
        )  # fmt: skip
        built = build(tree)
        if resume:
            restore(built.config, built)
        trainer = Trainer(built.config, built)
        for _ in range(steps):
            trainer.one_step()
        trainer.save(wait=True)
        trainer.measure.close()
        return built

    whole = parameter_hash(run("whole", 4).model)
    run("parts", 2)
    again = run("parts", 2, resume=True)
    assert again.step == 4 and parameter_hash(again.model) == whole
