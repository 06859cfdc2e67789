"""Damaged model folders are refused with the names of file and tensor."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ltrain.config.base import ConfigError
from ltrain.config.model import NewModel
from ltrain.model.families import resolve_spec
from ltrain.model.sharding import hf_shapes
from ltrain.model.sources import INDEX, SINGLE, RandomSource, SafetensorsSource

SPEC = resolve_spec(
    NewModel(
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        ffn_hidden_size=24,
        vocab_size=40,
        max_position_embeddings=32,
        tie_embeddings=True,
    )
)
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def tensors():
    return {name: torch.randn(shape) for name, shape in hf_shapes(SPEC).items()}


def refused(folder):
    with pytest.raises(ConfigError) as caught, SafetensorsSource(folder, SPEC):
        pass
    return str(caught.value)


def test_slices_are_read(tensors, tmp_path):
    save_file(tensors, tmp_path / SINGLE)
    with SafetensorsSource(tmp_path, SPEC) as source:
        assert torch.equal(source.read(Q, 0, 3, 9), tensors[Q][3:9])
        assert torch.equal(source.read(Q, 1, 2, 7), tensors[Q][:, 2:7])


def test_redundant_tensors_are_accepted(tensors, tmp_path):
    extra = {
        "lm_head.weight": torch.zeros(40, 16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    save_file({**tensors, **extra}, tmp_path / SINGLE)
    with SafetensorsSource(tmp_path, SPEC):
        pass


def test_missing_extra_and_misshapen_tensors(tensors, tmp_path):
    save_file({n: t for n, t in tensors.items() if n != Q}, tmp_path / SINGLE)
    assert Q in refused(tmp_path) and SINGLE in refused(tmp_path)
    save_file({**tensors, "model.layers.7.surprise": torch.ones(1)}, tmp_path / SINGLE)
    assert "model.layers.7.surprise" in refused(tmp_path)
    save_file({**tensors, Q: torch.ones(16, 17)}, tmp_path / SINGLE)
    assert "[16, 17]" in refused(tmp_path) and "[16, 16]" in refused(tmp_path)
    save_file({**tensors, Q: torch.ones(16, 16, dtype=torch.int32)}, tmp_path / SINGLE)
    assert "I32" in refused(tmp_path)


def test_truncated_and_missing_files(tensors, tmp_path):
    save_file(tensors, tmp_path / SINGLE)
    data = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(data[: len(data) // 2])
    assert "cut short" in refused(tmp_path)
    (tmp_path / SINGLE).write_bytes(b"")
    assert "cut short" in refused(tmp_path)
    (tmp_path / SINGLE).unlink()
    assert "must hold" in refused(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {Q: "part-1.safetensors"}}))
    assert "part-1.safetensors" in refused(tmp_path) and "missing" in refused(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {Q: "../elsewhere.safetensors"}}))
    assert "beside it" in refused(tmp_path)


def test_an_index_that_promises_what_a_file_lacks(tensors, tmp_path):
    save_file({n: t for n, t in tensors.items() if n != Q}, tmp_path / "a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    assert "a.safetensors" in refused(tmp_path) and Q in refused(tmp_path)


def test_random_tensors_depend_on_seed_and_name_only():
    one, two = RandomSource(SPEC, 3), RandomSource(SPEC, 3)
    k = Q.replace("q_proj", "k_proj")
    whole = one.read(Q, 0, 0, 16)
    two.read(k, 0, 0, 16)
    assert torch.equal(two.read(Q, 0, 4, 8), whole[4:8])
    assert not torch.equal(whole, one.read(k, 0, 0, 16))
    assert not torch.equal(whole, RandomSource(SPEC, 4).read(Q, 0, 0, 16))
