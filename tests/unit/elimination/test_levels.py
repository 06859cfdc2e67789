"""Every memory level computes a sparse layer's loss and gradients as autograd does."""

import pytest
import torch
from support.elimination import make_elimination
from support.lean import BLOCK, TARGETS, LateCopies, batch, build_lean, loss_and_gradients
from support.models import save_tiny

from ltrain.elimination.scorers import Random
from ltrain.model.families import read_spec
from ltrain.parallel.mesh import init_mesh, init_process_group
from ltrain.parallel.offload import HostStore


@pytest.fixture(scope="module")
def mesh():
    init_process_group(60)
    return init_mesh()


@pytest.mark.parametrize("adapter", [None, TARGETS])
@pytest.mark.parametrize("mode", ["qkv", "q", "layer", "backward"])
def test_gradients_are_those_of_the_stock_layer(mode, adapter, mesh, tmp_path):
    spec = read_spec(save_tiny(tmp_path / "llama", "llama"))
    wanted = None
    for level in ("none", "norms", "mlp", "full", "offload"):
        elimination = make_elimination(scorer=Random(), mode=mode, ratio=0.4, block=BLOCK)
        # On a CPU the level offload is full with another place for the residual.
        built = "full" if level == "offload" else level
        model = build_lean(
            tmp_path / "llama", spec, mesh, built, adapter=adapter, elimination=elimination
        ).train()
        copies = LateCopies()
        for layer in model.decoder.layers if level == "offload" else ():
            layer.lean_attention.store = HostStore(copies)
        tokens, labels, context = batch(mesh, num_tokens=157, documents=(33, 1, 46, 77))
        loss, gradients = loss_and_gradients(model, tokens, labels, context)
        assert all(0.3 < share < 0.9 for share, _ in context.eliminated.values())
        assert len(context.eliminated) == 2 and copies.fetched == (2 if level == "offload" else 0)
        wanted = wanted or (loss, gradients)
        assert abs(loss - wanted[0]) <= 1e-12 * abs(wanted[0]), level
        assert gradients.keys() == wanted[1].keys(), level
        for name, gradient in gradients.items():
            error = (gradient - wanted[1][name]).norm() / wanted[1][name].norm().clamp_min(1e-30)
            assert error <= 1e-10, f"{level}: {name} differs by {error:.1e}"


@pytest.mark.parametrize("mode", ["qkv", "layer", "backward"])
def test_nothing_is_attended_twice(mode, mesh, tmp_path, monkeypatch):
    spec = read_spec(save_tiny(tmp_path / "llama", "llama"))
    elimination = make_elimination(scorer=Random(), mode=mode, ratio=0.4, block=BLOCK)
    model = build_lean(tmp_path / "llama", spec, mesh, "full", elimination=elimination).train()
    planned = []
    import ltrain.attention.module as module

    plan = module.plan_attention
    monkeypatch.setattr(module, "plan_attention", lambda *a, **k: planned.append(1) or plan(*a, **k))
    tokens, labels, context = batch(mesh, num_tokens=160, documents=None)
    out = model(
        input_ids=tokens, position_ids=None, attention_mask=None, labels=labels, packed_seq_params=context
    )
    forward = len(planned)
    assert forward == (4 if mode == "backward" else 2)
    out[0].backward()
    assert len(planned) == forward


def test_the_residual_is_rebuilt_bit_for_bit(mesh, tmp_path):
    spec = read_spec(save_tiny(tmp_path / "llama", "llama"))
    elimination = make_elimination(scorer=Random(), ratio=0.4, block=BLOCK)
    model = build_lean(
        tmp_path / "llama", spec, mesh, "full", elimination=elimination, dtype=torch.bfloat16
    ).train()
    layer = model.decoder.layers[1]
    _, _, context = batch(mesh, num_tokens=160, documents=None)
    x = torch.randn(160, 1, spec.hidden_size, dtype=torch.bfloat16)
    inputs = layer._inputs(x, context)
    y, rebuild = layer._kept(x, inputs, elimination.choose(1, inputs))
    assert torch.equal(rebuild.compute(*rebuild.inputs), y)
