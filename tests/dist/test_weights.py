"""Import and export over tensor- and pipeline-parallel ranks: the folder that comes out is the one that went in."""

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file
from support.distributed import run_ranks
from support.models import build, hf_logits, save_tiny

from ltrain.config.model import NewModel
from ltrain.model.families import read_spec, resolve_spec
from ltrain.model.weights import export_model, import_model
from ltrain.parallel.mesh import init_mesh


def _round_trip(rank, world_size, folder, variants, degrees):
    results = []
    for tensor, pipeline, context in degrees:
        mesh = init_mesh(tensor=tensor, pipeline=pipeline, context=context)
        for variant in variants:
            spec = read_spec(folder / variant)
            model = build(spec, mesh, sequence_parallel=True)
            import_model(model, spec, mesh)
            export_model(model, spec, mesh, folder / f"{variant}-{tensor}{pipeline}{context}")
            if pipeline == 1:
                results.append(_logits(model, spec))
    return results


def _logits(model, spec):
    tokens = torch.arange(40).unsqueeze(0) % spec.vocab_size
    with torch.no_grad():
        local = model(input_ids=tokens, position_ids=None, attention_mask=None)
    parts = [torch.empty_like(local) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(parts, local, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, -1)[..., : spec.vocab_size].numpy()


def _tensors(folder):
    return {n: v for file in sorted(folder.glob("*.safetensors")) for n, v in load_file(file).items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_round_trip_over_ranks(world_size, tmp_path):
    variants = ["llama-mha-bias", "qwen2", "qwen3-bias-tied"]
    for variant in variants:
        save_tiny(tmp_path / variant, variant)
    degrees = {2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)], 4: [(2, 2, 1)]}[world_size]
    results = run_ranks(_round_trip, world_size, tmp_path, variants, degrees)
    for variant in variants:
        before = _tensors(tmp_path / variant)
        for degree in degrees:
            after = _tensors(tmp_path / f"{variant}-{''.join(map(str, degree))}")
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
    if world_size == 2:
        for i, variant in enumerate(variants):
            expected = hf_logits(tmp_path / variant, torch.arange(40).unsqueeze(0)).numpy()
            for rank_results in results:
                assert np.abs(rank_results[i] - expected).max() <= 1e-5


def _new_model(rank, world_size, folder):
    config = NewModel(
        family="qwen3",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=48,
        vocab_size=101,
        max_position_embeddings=64,
    )
    spec = resolve_spec(config)
    for name, tensor, pipeline in (("tensor", 2, 1), ("pipeline", 1, 2)):
        mesh = init_mesh(tensor=tensor, pipeline=pipeline)
        model = build(spec, mesh)
        import_model(model, spec, mesh, seed=7)
        export_model(model, spec, mesh, folder / name)


def test_a_new_model_does_not_depend_on_the_layout(tmp_path):
    run_ranks(_new_model, 2, tmp_path)
    one, two = _tensors(tmp_path / "tensor"), _tensors(tmp_path / "pipeline")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    weight = one["model.layers.1.self_attn.q_proj.weight"]
    assert 0.015 < weight.std() < 0.025
    # `transformers` loads the folder that was made without one.
    assert read_spec(tmp_path / "tensor").qk_norm
    assert hf_logits(tmp_path / "tensor", torch.arange(20).unsqueeze(0)).isfinite().all()


def _unwritable(rank, world_size, folder):
    mesh = init_mesh(tensor=2)
    spec = read_spec(folder / "in")
    model = build(spec, mesh)
    import_model(model, spec, mesh)
    try:
        export_model(model, spec, mesh, folder / "occupied")
    except Exception as error:
        return str(error)
    return None


def test_every_rank_hears_of_a_failed_export(tmp_path):
    save_tiny(tmp_path / "in", "llama")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").write_text("precious")
    for message in run_ranks(_unwritable, 2, tmp_path):
        assert "not a model folder" in message
    assert (tmp_path / "occupied" / "thesis.tex").read_text() == "precious"
