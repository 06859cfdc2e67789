"""Reading config.json, making new models, and what is refused."""

import json

import pytest

from ltrain.config.base import ConfigError
from ltrain.config.model import HFModel, LoraAdapter, NewModel
from ltrain.model.families import read_spec, resolve_spec
from ltrain.model.freeze import frozen_tensors
from ltrain.model.sharding import hf_shapes, stage_shards

LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "torch_dtype": "bfloat16",
}
QWEN_3B = {
    "model_type": "qwen2",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "sliding_window": 32768,
}


def write(folder, config, **changes):
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_published_sizes(tmp_path):
    llama = read_spec(write(tmp_path, LLAMA_8B))
    assert llama.num_parameters == 8_030_261_248
    assert (llama.head_dim, llama.dtype, llama.rope.original_length) == (128, "bfloat16", 8192)
    qwen = read_spec(write(tmp_path, QWEN_3B))
    assert qwen.num_parameters == 3_085_938_688
    assert qwen.qkv_bias and not qwen.o_bias and set(qwen.windows) == {None}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "num_kv_heads"),
        ({"torch_dtype": "int8"}, "dtype"),
    ],
)
def test_what_is_unsupported_is_refused_by_name(changes, word, tmp_path):
    with pytest.raises(ConfigError, match=word):
        read_spec(write(tmp_path, LLAMA_8B, **changes))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_spec(tmp_path)


def new(**fields):
    defaults = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 48}
    return NewModel(**{**defaults, "max_position_embeddings": 64, **fields})


def test_a_new_model_takes_the_tokenizers_vocabulary_and_refuses_a_smaller_one():
    assert resolve_spec(new(), tokenizer_vocab_size=258).vocab_size == 258
    with pytest.raises(ConfigError, match="tokenizer"):
        resolve_spec(new(vocab_size=100), tokenizer_vocab_size=258)
    with pytest.raises(ConfigError, match="sliding_window"):
        resolve_spec(new(sliding_window=8, vocab_size=100))


@pytest.mark.parametrize(("tensor", "pipeline", "word"), [(4, 1, "num_kv_heads"), (1, 3, "layers")])
def test_degrees_that_do_not_divide_are_refused(tensor, pipeline, word):
    with pytest.raises(ConfigError, match=word):
        resolve_spec(new(vocab_size=100)).check_parallel(tensor=tensor, pipeline=pipeline)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("degrees", [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_the_shards_of_all_ranks_cover_every_tensor(family, tied, degrees):
    """Every row and column of every tensor is held, by every rank that the map says, and nothing else."""
    spec = resolve_spec(new(family=family, vocab_size=101, tie_embeddings=tied))
    tensor, pipeline = degrees
    held: dict[str, set] = {}
    for stage in range(pipeline):
        for t in range(tensor):
            shards = stage_shards(spec, stage=stage, stages=pipeline, tensor_rank=t, tensor_size=tensor)
            for shard in shards.values():
                for piece in shard.pieces:
                    assert piece.offset + piece.stop - piece.start <= shard.shape[piece.dim]
                    held.setdefault(piece.name, set()).update(
                        (piece.dim, i) for i in range(piece.start, piece.stop)
                    )
    shapes = hf_shapes(spec)
    assert held.keys() == shapes.keys()
    for name, indices in held.items():
        (dim,) = {d for d, _ in indices}
        assert {i for _, i in indices} == set(range(shapes[name][dim]))


def test_freezing_by_pattern():
    spec = resolve_spec(new(vocab_size=101))
    assert frozen_tensors(spec, new()) == set()
    frozen = frozen_tensors(spec, new(freeze=("*.mlp.*",)))
    assert len(frozen) == 12 and all(".mlp." in name for name in frozen)
    everything = set(hf_shapes(spec))
    assert frozen_tensors(spec, new(adapter=LoraAdapter())) == everything
    kept = everything - frozen_tensors(spec, new(adapter=LoraAdapter(also_train=("*norm*", "*embed*"))))
    assert "model.norm.weight" in kept and "model.embed_tokens.weight" in kept and len(kept) == 10
    for patterns, word in (
        (("*nothing*",), "matches no"),
        (("*q_proj*",), "part"),
        (("*",), "nothing to train"),
    ):
        with pytest.raises(ConfigError, match=word):
            frozen_tensors(spec, new(freeze=patterns))


def test_an_hf_model_is_read_from_its_folder(tmp_path):
    assert resolve_spec(HFModel(path=write(tmp_path, QWEN_3B))).source == tmp_path
