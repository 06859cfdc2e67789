"""Bytes that a sparse layer saves, at the proportions of Llama-2-7B, by hooks."""

import pytest
import torch
from support.elimination import make_context, make_elimination, make_model

from ltrain.parallel.mesh import init_mesh, init_process_group

# Llama-2-7B: head size 128, as many kv heads, MLP 2.6875 x as wide as the model.
SHAPE = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 1376}


@pytest.mark.parametrize("mode,most", [("qkv", 10.0), ("backward", 10.0), ("layer", 9.0)])
def test_mlp_and_thirty_percent_fewer_tokens(mode, most, tmp_path):
    from support.models import save_tiny

    init_process_group(60)
    mesh = init_mesh()
    folder = tmp_path / "llama"
    save_tiny(folder, "llama", **SHAPE)
    elimination = make_elimination(torch.rand(20), mode=mode, ratio=0.7, strata=2)
    model = make_model(folder, mesh, elimination, memory_level="mlp").bfloat16()
    layer = model.decoder.layers[1].train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    context = make_context(160)
    context.rope_tables = layer.self_attention.core_attention.settings.rope.tables(context.rope_positions)
    x = torch.randn(160, 1, 512, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, packed_seq_params=context)
    assert context.eliminated[1][0] == 0.7
    # In bytes of a bf16 model a token, over the hidden size.
    assert sum(seen.values()) / 160 / 512 <= most
