"""Import and export over tensor- and pipeline-parallel ranks: what comes out is the folder that went in."""

import numpy as np
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file
from support.distributed import run_ranks
from support.models import build, hf_logits, our_logits, save_tiny

from ltrain.config.model import NewModel
from ltrain.model.families import read_spec, resolve_spec
from ltrain.model.weights import export_model, import_model
from ltrain.parallel.mesh import init_mesh

VARIANTS = ("llama-mha-bias", "qwen2", "qwen3-bias-tied")
NEW = NewModel(
    family="qwen3",
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=48,
    vocab_size=101,
    max_position_embeddings=64,
)


def _two_ranks(rank, world_size, folder):
    logits = {}
    for tensor, pipeline in ((2, 1), (1, 2), (1, 1)):
        mesh = init_mesh(tensor=tensor, pipeline=pipeline)
        for variant in VARIANTS:
            spec = read_spec(folder / variant)
            model = build(spec, mesh, sequence_parallel=True)
            import_model(model, spec, mesh)
            export_model(model, spec, mesh, folder / f"{variant}-{tensor}{pipeline}")
            if tensor == 2:
                logits[variant] = _logits(model, spec)
        new = resolve_spec(NEW)
        model = build(new, mesh)
        import_model(model, new, mesh, seed=7)
        export_model(model, new, mesh, folder / f"new-{tensor}{pipeline}")
    try:
        export_model(model, new, mesh, folder / "occupied")
        message = "no error"
    except Exception as error:
        message = str(error)
    return logits, message


def _logits(model, spec):
    local = our_logits(model, torch.arange(40).unsqueeze(0))
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(local) for _ in range(group.size())]
    torch.distributed.all_gather(parts, local, group=group)
    return torch.cat(parts, -1)[..., : spec.vocab_size].numpy()


def _tensors(folder):
    return {n: v for file in sorted(folder.glob("*.safetensors")) for n, v in load_file(file).items()}


def _assert_same(one, two):
    before, after = _tensors(one), _tensors(two)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_ranks(tmp_path):
    for variant in VARIANTS:
        save_tiny(tmp_path / variant, variant)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").write_text("precious")
    results = run_ranks(_two_ranks, 2, tmp_path)
    for variant in VARIANTS:
        for degrees in ("21", "12", "11"):
            _assert_same(tmp_path / variant, tmp_path / f"{variant}-{degrees}")
        expected = hf_logits(tmp_path / variant, torch.arange(40).unsqueeze(0)).numpy()
        for logits, _ in results:
            assert np.abs(logits[variant] - expected).max() <= 1e-5
    # A new model is the same whatever the layout; `transformers` loads the folder written without a source.
    for degrees in ("12", "11"):
        _assert_same(tmp_path / "new-21", tmp_path / f"new-{degrees}")
    assert 0.015 < _tensors(tmp_path / "new-21")["model.layers.1.self_attn.q_proj.weight"].std() < 0.025
    assert hf_logits(tmp_path / "new-21", torch.arange(20).unsqueeze(0)).isfinite().all()
    # Every rank hears of an export that rank 0 could not make, and what was there is untouched.
    assert all("not a model folder" in message for _, message in results)
    assert (tmp_path / "occupied" / "thesis.tex").read_text() == "precious"


def _four_ranks(rank, world_size, folder):
    mesh = init_mesh(tensor=2, pipeline=2)
    spec = read_spec(folder / "in")
    model = build(spec, mesh)
    import_model(model, spec, mesh)
    export_model(model, spec, mesh, folder / "out", max_file_bytes=20_000)


def test_tensor_and_pipeline_parallel_with_tied_embeddings(tmp_path):
    save_tiny(tmp_path / "in", "qwen3-bias-tied")
    run_ranks(_four_ranks, 4, tmp_path)
    _assert_same(tmp_path / "in", tmp_path / "out")
