"""Our tables and rotation against `transformers`' rotary modules, for every kind; the export fields feed
both."""

import json

import pytest
import torch
from pydantic import TypeAdapter
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ltrain.attention.rope import Rope, apply_rope
from ltrain.config.base import ConfigError
from ltrain.config.rope import RopeConfig

HEAD_DIM, BASE_LENGTH, TARGET = 32, 128, 1024


def base_rope() -> Rope:
    config = {"rope_theta": 10000.0, "max_position_embeddings": BASE_LENGTH}
    return Rope.from_hf(config, HEAD_DIM)


def change(**fields):
    return TypeAdapter(RopeConfig).validate_python(fields)


KINDS = [
    {"kind": "keep"},
    {"kind": "abf", "theta": 8e6},
    {"kind": "linear"},
    {"kind": "linear", "factor": 16},
    {"kind": "ntk"},
    {"kind": "dynamic", "factor": 2.0},
    {"kind": "yarn"},
    {"kind": "yarn", "factor": 32, "theta": 1e6, "beta_fast": 16, "truncate": False},
    {"kind": "yarn", "mscale": 1.0, "mscale_all_dim": 0.5},
    {"kind": "yarn", "attention_factor": 1.25},
    {"kind": "longrope"},
    {"kind": "llama3", "factor": 8},
]


@pytest.mark.parametrize("fields", KINDS, ids=lambda f: "-".join(map(str, f.values())))
def test_tables_equal_those_of_the_exported_config(fields, tmp_path):
    if fields["kind"] == "longrope":
        half = HEAD_DIM // 2
        lists = {"short_factor": [1.0] * half, "long_factor": [1.0 + i / 2 for i in range(half)]}
        (tmp_path / "factors.json").write_text(json.dumps(lists))
        fields = {**fields, "factors": str(tmp_path / "factors.json")}
    rope = base_rope().extend(change(**fields), TARGET)
    exported = json.loads(json.dumps(rope.to_hf()))
    config = LlamaConfig(hidden_size=HEAD_DIM * 2, num_attention_heads=2, head_dim=HEAD_DIM, **exported)
    module = LlamaRotaryEmbedding(config)
    positions = torch.arange(TARGET, dtype=torch.int32)
    x = torch.randn(2, TARGET, 3, HEAD_DIM)
    cos_hf, sin_hf = module(x, positions[None].long())
    expected, _ = apply_rotary_pos_emb(x, x, cos_hf, sin_hf, unsqueeze_dim=2)
    cos, sin = rope.tables(positions)
    torch.testing.assert_close(torch.cat((cos, cos), -1)[None], cos_hf, rtol=0, atol=1e-6)
    torch.testing.assert_close(apply_rope(x, cos, sin), expected, rtol=1e-5, atol=1e-5)
    # What was exported reads back as the same embedding.
    again = Rope.from_hf(exported, HEAD_DIM)
    assert again.parameters == rope.parameters
    assert again.max_position_embeddings == rope.max_position_embeddings
    if fields["kind"] != "dynamic":
        assert rope.max_position_embeddings >= TARGET


def test_every_kind_but_keep_changes_the_frequencies():
    before, _ = base_rope().frequencies()
    for fields in KINDS[1:]:
        if fields["kind"] != "longrope":
            after, _ = base_rope().extend(change(**fields), TARGET).frequencies()
            assert not torch.equal(before, after), fields


def test_positions_in_any_order_and_by_batch():
    rope = base_rope()
    cos, sin = rope.tables(torch.arange(50))
    order = torch.randperm(50)
    shuffled, _ = rope.tables(order.int())
    assert torch.equal(shuffled, cos[order])
    x = torch.randn(2, 50, 1, HEAD_DIM)
    batched = apply_rope(x, *rope.tables(torch.arange(50).expand(2, 50)))
    assert torch.equal(batched, apply_rope(x, cos, sin))


def test_bf16_is_rotated_in_fp32():
    rope = base_rope()
    cos, sin = rope.tables(torch.arange(64))
    x = torch.randn(1, 64, 2, HEAD_DIM).bfloat16()
    assert torch.equal(apply_rope(x, cos, sin), apply_rope(x.float(), cos, sin).bfloat16())


def test_ntk_is_a_base_and_abf_keeps_a_scaling():
    ntk = base_rope().extend(change(kind="ntk", factor=8), TARGET)
    assert ntk.parameters["rope_type"] == "default"
    assert ntk.parameters["rope_theta"] == pytest.approx(10000.0 * 8 ** (32 / 30))
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    llama = Rope.from_hf(
        {"rope_theta": 5e5, "rope_scaling": scaling, "max_position_embeddings": 512}, HEAD_DIM
    )
    raised = llama.extend(change(kind="abf", theta=8e6), TARGET)
    assert raised.parameters == {**llama.parameters, "rope_theta": 8e6}
    # A second stretching starts from the context before the first.
    assert llama.extend(change(kind="yarn"), TARGET).parameters["factor"] == TARGET / 64


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"max_position_embeddings": 64, "rope_scaling": {"rope_type": "magic"}}, "magic"),
        ({"max_position_embeddings": 64, "rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "beta"),
        ({"max_position_embeddings": 64, "partial_rotary_factor": 0.5}, "partial"),
        ({"rope_theta": 1e4}, "max_position_embeddings"),
    ],
)
def test_what_is_unsupported_is_refused_by_name(config, word):
    with pytest.raises(ConfigError, match=word):
        Rope.from_hf(config, HEAD_DIM)


def test_a_factor_that_does_not_reach_the_context_is_refused():
    with pytest.raises(ConfigError, match="use at least 8"):
        base_rope().extend(change(kind="yarn", factor=4), TARGET)
    with pytest.raises(ConfigError, match="use at least 8"):
        base_rope().extend(change(kind="ntk", factor=4), TARGET)


def test_bad_factor_lists_are_refused(tmp_path):
    path = tmp_path / "factors.json"
    path.write_text(json.dumps({"short_factor": [1.0], "long_factor": [1.0]}))
    with pytest.raises(ConfigError, match="16 positive numbers"):
        base_rope().extend(change(kind="longrope", factors=str(path)), TARGET)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "yarn", "beta_fast": 1, "beta_slow": 2},
        {"kind": "yarn", "mscale": 1.0},
        {"kind": "llama3", "low_freq_factor": 4, "high_freq_factor": 4},
        {"kind": "yarn", "factor": 0.5},
        {"kind": "abf"},
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields):
    with pytest.raises(ValueError):
        change(**fields)
