"""Imported models give the logits of `transformers`; exported folders are the imported ones, bit by bit."""

import json

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from support.models import VARIANTS, build, hf_logits, our_logits, save_tiny

from ltrain.attention import patterns
from ltrain.config.rope import RopeConfig
from ltrain.model.attention_file import parse_attention, read_attention
from ltrain.model.families import extend_rope, read_spec
from ltrain.model.sources import check_weights
from ltrain.model.weights import export_model, import_model
from ltrain.parallel.mesh import init_mesh, init_process_group


@pytest.fixture(scope="module")
def mesh():
    init_process_group(60)
    return init_mesh()


def tensors(folder):
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_round_trip(variant, tmp_path, mesh):
    source = save_tiny(tmp_path / "in", variant)
    spec = read_spec(source)
    check_weights(spec)
    model = build(spec, mesh)
    import_model(model, spec, mesh)
    tokens = torch.randint(0, spec.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = hf_logits(source, tokens)
    assert expected.std() > 0.1
    ours = our_logits(model, tokens)
    assert (ours - expected).abs().max() <= 1e-5
    export_model(model, spec, mesh, tmp_path / "out", max_file_bytes=20_000)
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(hf_logits(tmp_path / "out", tokens), expected)
    old, new = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out"))
    assert {k: v for k, v in old.items() if k != "transformers_version"} == {
        k: v for k, v in new.items() if k != "transformers_version"
    }
    assert sum(p.numel() for p in model.parameters()) == spec.num_parameters


@pytest.mark.parametrize(
    "rope",
    [{"kind": "yarn"}, {"kind": "abf", "theta": 1e6}, {"kind": "linear"}, {"kind": "ntk", "factor": 5}],
)
def test_an_extended_model_is_exported_with_its_rope(rope, tmp_path, mesh):
    source = save_tiny(tmp_path / "in", "llama")
    spec = extend_rope(read_spec(source), TypeAdapter(RopeConfig).validate_python(rope), 256)
    model = build(spec, mesh)
    import_model(model, spec, mesh)
    export_model(model, spec, mesh, tmp_path / "out")
    tokens = torch.randint(0, spec.vocab_size, (1, 200), generator=torch.Generator().manual_seed(1))
    assert (our_logits(model, tokens) - hf_logits(tmp_path / "out", tokens)).abs().max() <= 1e-5
    assert (hf_logits(source, tokens) - hf_logits(tmp_path / "out", tokens)).abs().max() > 1e-2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] >= 256
    assert "rope_theta" not in config and "rope_scaling" not in config
    assert config["rope_parameters"] == spec.rope.parameters


def test_bf16_round_trip_is_bit_exact(tmp_path, mesh):
    source = save_tiny(tmp_path / "in", "qwen3", dtype=torch.bfloat16)
    spec = read_spec(source)
    assert spec.dtype == "bfloat16"
    model = build(spec, mesh, dtype=torch.bfloat16)
    import_model(model, spec, mesh)
    export_model(model, spec, mesh, tmp_path / "out")
    before, after = tensors(source), tensors(tmp_path / "out")
    assert all(after[n].dtype == torch.bfloat16 and torch.equal(before[n], after[n]) for n in before)


def test_the_older_rope_fields_give_the_same_model(tmp_path, mesh):
    source = save_tiny(tmp_path / "in", "llama-tied-llama3")
    path = source / "config.json"
    config = json.loads(path.read_text())
    spec = read_spec(source)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config))
    assert read_spec(source) == spec


def test_an_exported_folder_says_what_it_was_trained_to_attend(tmp_path, mesh):
    spec = read_spec(save_tiny(tmp_path / "in", "llama"))
    model = build(spec, mesh)
    import_model(model, spec, mesh)
    export_model(model, spec, mesh, tmp_path / "out", pattern=patterns.s2(stride=4), block=16)
    expected = parse_attention({"pattern": {"kind": "s2", "stride": 4}, "block": 16}, "test")
    assert read_attention(tmp_path / "out") == expected
    assert read_attention(tmp_path / "in").pattern.kind == "dense"
    export_model(model, spec, mesh, tmp_path / "out")
    assert read_attention(tmp_path / "out").pattern.kind == "dense", "of an older export nothing is left"
