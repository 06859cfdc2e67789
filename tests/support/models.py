"""Tiny models of every family, as `transformers` makes them and as we do."""

from functools import partial
from pathlib import Path

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from ltrain.model.build import build_model
from ltrain.parallel.seam import cpu_seam
from support.dense_attention import DenseAttention

COMMON = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
VARIANTS = {
    "llama": {},
    "llama-mha-bias": {"num_key_value_heads": 4, "attention_bias": True, "head_dim": 16},
    "llama-tied-llama3": {
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2": {"tie_word_embeddings": True},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "qwen3-bias-tied": {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 8},
    "mistral": {"sliding_window": None, "head_dim": 16},
    "mistral-window": {"sliding_window": 7},
}


def save_tiny(folder: Path, variant: str, *, dtype: torch.dtype = torch.float32, **overrides) -> Path:
    """Save a random model of a variant, every tensor random (biases and norms too); returns its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(variant.split("-")[0], **{**COMMON, **VARIANTS[variant], **overrides})
    torch.manual_seed(len(variant))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    return folder


def build(spec, mesh, **arguments):
    """Our model of this rank, with dense attention."""
    with cpu_seam():
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return build_model(
        spec,
        core_attention=partial(DenseAttention, rope=spec.rope, windows=spec.windows),
        tensor=mesh.tensor.size,
        pipeline=mesh.pipeline.size,
        pre_process=mesh.is_first_stage,
        post_process=mesh.is_last_stage,
        **arguments,
    )


def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits fp32 [B, T, V] of a folder through `transformers`, with eager attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens).logits.float()


def our_logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V_padded / tensor degree] of a model that is one stage."""
    with torch.no_grad():
        return model(input_ids=tokens, position_ids=None, attention_mask=None)
