"""The FLOP counter against brute force and closed forms."""

import pytest

from ltrain.config.model import NewModel
from ltrain.model.families import resolve_spec
from ltrain.model.flops import flops_per_token, model_flops, step_flops, visible_pairs


def spec(**fields):
    defaults = {"hidden_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 48}
    return resolve_spec(NewModel(**{**defaults, "max_position_embeddings": 64, "vocab_size": 100, **fields}))


@pytest.mark.parametrize("length", [1, 2, 7, 63])
@pytest.mark.parametrize("window", [None, 1, 5, 63, 100])
def test_visible_pairs(length, window):
    brute = sum(k <= q and (window is None or k > q - window) for q in range(length) for k in range(length))
    assert visible_pairs(length, window) == brute


def test_the_closed_form():
    model = spec()
    linear = 6 * (3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 32 * 100)
    attention = 3 * 3 * 4 * 32 * (40 * 41 // 2 + 23 * 24 // 2)
    assert model_flops(model, [40, 23]) == linear * 63 + attention
    assert flops_per_token(model, 64) == model_flops(model, [64]) / 64


def test_packing_matters_but_order_and_tying_do_not():
    model = spec()
    assert model_flops(model, [63]) > model_flops(model, [40, 23]) == model_flops(model, [23, 40])
    assert model_flops(spec(tie_embeddings=True), [63]) == model_flops(model, [63])


def test_executed_flops_are_the_models_at_neutral_settings():
    model = spec()
    neutral = step_flops(model, [50])
    assert neutral.executed == neutral.model
    half = step_flops(model, [50], densities=[0.5] * 3)
    attention = 3 * 3 * 4 * 32 * visible_pairs(50)
    assert half.model == neutral.model
    assert half.executed == neutral.executed - attention / 2
    assert step_flops(model, [50], memory_level="norms").executed == neutral.executed
    once_more = 2 * 50 * 3 * 2 * model.hidden_size * model.ffn_hidden_size
    assert step_flops(model, [50], memory_level="mlp").executed == neutral.executed + once_more
    attention = 2 * 50 * 3 * model.hidden_size * (2 * model.q_size + 2 * model.kv_size)
    full = step_flops(model, [50], memory_level="full")
    assert full.executed == neutral.executed + once_more + attention
