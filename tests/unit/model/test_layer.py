"""Every memory level computes the stock layer's loss and gradients, and saves what it says."""

import pytest
import torch
from support.lean import GATE, NSA, TARGETS, LateCopies, batch, build_lean, loss_and_gradients, run
from support.models import save_tiny

from ltrain.attention import patterns
from ltrain.config.base import ConfigError
from ltrain.model.families import read_spec
from ltrain.parallel.mesh import init_mesh, init_process_group
from ltrain.parallel.offload import HostStore

LEVELS = ("norms", "mlp", "full")
CASES = {
    "llama": {},
    "llama-mha-bias": {},
    "qwen2-window": {},
    "qwen3": {},
    "qwen3-lora": {"adapter": TARGETS},
    "llama-mha-bias-lora": {"adapter": TARGETS},
    "llama-lora-attention": {"adapter": ("qkv", "o")},
    "qwen3-lora-nsa": {"adapter": TARGETS, "pattern": patterns.nsa(**NSA)},
    "qwen2-window-lora-nsa": {"adapter": None, "pattern": patterns.nsa(**NSA, dense_layers=(1,))},
    "llama-lora-gate": {"adapter": None, "pattern": patterns.seer_gate(**GATE)},
}


@pytest.fixture(scope="module")
def mesh():
    init_process_group(60)
    return init_mesh()


def _spec(tmp_path, variant):
    return read_spec(save_tiny(tmp_path / variant, variant))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_stock_layer(case, mesh, tmp_path):
    variant = case.split("-lora")[0]
    spec, options = _spec(tmp_path, variant), CASES[case]
    want_loss, want = None, None
    for level in ("none", *LEVELS):
        model = build_lean(tmp_path / variant, spec, mesh, level, **options)
        loss, gradients = loss_and_gradients(model, *batch(mesh))
        if want is None:
            want_loss, want = loss, gradients
            learned = [g for name, g in gradients.items() if ".learned." in name]
            assert bool(learned) == ("pattern" in options) and all(g.abs().sum() > 0 for g in learned)
            continue
        assert abs(loss - want_loss) <= 1e-12 * abs(want_loss), level
        assert gradients.keys() == want.keys(), level
        for name, gradient in gradients.items():
            error = (gradient - want[name]).norm() / want[name].norm().clamp_min(1e-30)
            assert error <= 1e-10, f"{level}: {name} differs by {error:.1e}"


@pytest.mark.parametrize("pattern", [None, patterns.nsa(**NSA), patterns.seer_gate(**GATE)])
def test_offloaded_residuals_come_back_one_layer_ahead(pattern, mesh, tmp_path):
    spec = _spec(tmp_path, "llama")
    wanted = loss_and_gradients(build_lean(tmp_path, spec, mesh, "full", pattern=pattern), *batch(mesh))
    model = build_lean(tmp_path, spec, mesh, "full", pattern=pattern)
    engine = LateCopies()
    store = HostStore(engine)
    ahead = []
    for layer in model.decoder.layers:
        layer.lean_attention.store = store
        layer.lean_mlp.norm.register_forward_pre_hook(lambda *_: ahead.append(engine.fetched))
    for _ in range(2):
        loss, gradients = loss_and_gradients(model, *batch(mesh))
        assert loss == wanted[0] and not engine.queue
        assert all(torch.equal(gradients[name], value) for name, value in wanted[1].items())
    assert engine.fetched == 2 * 2 and engine.buffers == 2, "each residual once, in buffers used again"
    assert 1 not in ahead, "the first layer's residual is under way before the second layer works"
    with torch.no_grad():
        run(model, *batch(mesh))
    assert engine.fetched == 4 and engine.buffers == 2, "evaluation moves nothing"


def test_attention_modules_of_others_are_refused(mesh, tmp_path):
    from support.models import build

    with pytest.raises(TypeError, match="needs CoreAttention, not DenseAttention"):
        build(_spec(tmp_path, "llama"), mesh, memory_level="mlp")


def test_offload_without_a_gpu_is_refused(tmp_path):
    from support.tiny import tiny_tree

    from ltrain.config.load import validate
    from ltrain.train.plan import check_device

    with pytest.raises(ConfigError, match=r"memory\.level='offload' needs a GPU"):
        check_device(validate(tiny_tree(tmp_path, memory__level="offload")))
