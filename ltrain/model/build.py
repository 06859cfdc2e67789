"""From a `ModelSpec` to one pipeline stage of megatron-core's GPT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import nn

from ltrain.config.memory import MemoryLevel
from ltrain.config.model import LoraAdapter
from ltrain.elimination.layer import eliminating
from ltrain.elimination.runtime import Elimination
from ltrain.model.layer import LeanTransformerLayer
from ltrain.model.lora import LoraColumnParallelLinear, LoraRowParallelLinear
from ltrain.model.spec import ModelSpec
from ltrain.model.subspace import SubspaceRowParallelLinear, SubspaceWordEmbedding
from ltrain.parallel.offload import CudaCopies, HostStore
from ltrain.parallel.seam import cpu_seam, device, on_cpu
from ltrain.parallel.stage_link import Subspace


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm, statistics in fp32, with the constructor that mcore calls.

    Under sequence parallelism each tensor-parallel rank norms its own tokens; the mark on the weight tells
    mcore to sum the gradient over these ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any) -> None:
        where = torch.device("cpu") if config.use_cpu_initialization else device()
        super().__init__(hidden_size, eps=eps, device=where, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class RowParallelLinearWithBias(RowParallelLinear):
    """A row-parallel linear that has a bias although the model's other linears have none."""

    def __init__(self, *args: Any, bias: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, bias=True, **kwargs)


def transformer_config(
    spec: ModelSpec,
    *,
    dtype: torch.dtype = torch.float32,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    sequence_parallel: bool = False,
    variable_seq_lengths: bool = False,
    **options: Any,
) -> TransformerConfig:
    """mcore's configuration of this model. `options` are further fields of `TransformerConfig`.

    Weights are left uninitialised: they are loaded, or drawn by name, after the model is built. Nothing that
    needs Apex, Transformer Engine or a compiler is used.
    """
    fields: dict[str, Any] = {
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "num_query_groups": spec.num_kv_heads,
        "kv_channels": spec.head_dim,
        "ffn_hidden_size": spec.ffn_hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": spec.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "context_parallel_size": context,
        "sequence_parallel": sequence_parallel and tensor > 1,
        "variable_seq_lengths": variable_seq_lengths,
        # mcore checks this although the model has no experts: the default refuses variable lengths.
        "moe_token_dispatcher_type": "alltoall",
        "use_cpu_initialization": on_cpu(),
        "perform_initialization": False,
        "calculate_per_token_loss": True,
        "deallocate_pipeline_outputs": pipeline > 1,
        "batch_p2p_comm": not on_cpu(),
    }
    return TransformerConfig(**{**fields, **options})


def layer_spec(
    spec: ModelSpec,
    core_attention: Callable[..., nn.Module],
    lora: LoraAdapter | None = None,
    space: Subspace | None = None,
    memory_level: MemoryLevel = "none",
    elimination: Elimination | None = None,
    store: HostStore | None = None,
) -> ModuleSpec:
    """One transformer layer of mcore's local modules around `core_attention`; with `space` its residual
    writers write into the subspace only.

    `core_attention` is called as mcore calls `DotProductAttention`, by keyword: config, layer_number,
    attn_mask_type, attention_type, cp_comm_type, softmax_scale, pg_collection. Memory levels other than
    "none" need a `CoreAttention`, and "offload" a `store`.
    """
    targets = lora.targets if lora else ()
    column = ModuleSpec(module=LoraColumnParallelLinear, params={"lora": lora})
    row = ModuleSpec(module=LoraRowParallelLinear, params={"lora": lora})
    proj: Any = RowParallelLinearWithBias if spec.o_bias else RowParallelLinear
    if "o" in targets:
        proj = ModuleSpec(module=LoraRowParallelLinear, params={"lora": lora, "always_bias": spec.o_bias})
    down: Any = row if "down" in targets else RowParallelLinear
    if space is not None:
        proj = down = ModuleSpec(module=SubspaceRowParallelLinear, params={"space": space})
    qkv: Any = partial(LoraColumnParallelLinear, lora=lora) if "qkv" in targets else ColumnParallelLinear
    module: type = TransformerLayer
    params: dict[str, Any] = {}
    if memory_level != "none":
        module, params = LeanTransformerLayer, {"level": memory_level, "store": store}
    if elimination is not None:
        module, params = eliminating(module), params | {"elimination": elimination}
    return ModuleSpec(
        module=module,
        params=params,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=qkv,
                    core_attention=core_attention,
                    linear_proj=proj,
                    q_layernorm=RMSNorm if spec.qk_norm else None,
                    k_layernorm=RMSNorm if spec.qk_norm else None,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=column if "gate_up" in targets else ColumnParallelLinear,
                    linear_fc2=down,
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build_model(
    spec: ModelSpec,
    *,
    core_attention: Callable[..., nn.Module],
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    dtype: torch.dtype = torch.float32,
    pre_process: bool = True,
    post_process: bool = True,
    sequence_parallel: bool = False,
    variable_seq_lengths: bool = False,
    model_class: Callable[..., GPTModel] = GPTModel,
    lora: LoraAdapter | None = None,
    memory_level: MemoryLevel = "none",
    elimination: Elimination | None = None,
    options: dict[str, Any] | None = None,
    **model_arguments: Any,
) -> GPTModel:
    """This pipeline stage of the model, on this process's device, with uninitialised matrices.

    mcore's process groups must exist with the degrees given. `model_class` and `model_arguments` serve
    subclasses of `GPTModel`; `lora` adds adapters; `memory_level` is `memory.level`; with `elimination`
    layers drop tokens and need `CoreAttention`; `options` are further fields of `TransformerConfig`.
    Raises ConfigError where the degrees don't divide the model. Fill it with
    `ltrain.model.weights.import_model`.
    """
    spec.check_parallel(tensor=tensor, pipeline=pipeline)
    config = transformer_config(
        spec,
        dtype=dtype,
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        sequence_parallel=sequence_parallel,
        variable_seq_lengths=variable_seq_lengths,
        **(options or {}),
    )
    per_stage = spec.num_layers // pipeline
    settings: dict[str, Any] = {
        "memory_level": memory_level,
        "elimination": elimination,
        "store": HostStore(CudaCopies(device())) if memory_level == "offload" else None,
    }
    layers = [layer_spec(spec, core_attention, lora, **settings)] * per_stage
    space = None
    if spec.subspace is not None:
        space = Subspace(spec.hidden_size, spec.subspace.rank, spec.subspace.seed)
        first = get_transformer_layer_offset(config)
        held = max(0, min(per_stage, spec.num_layers - spec.subspace.free_layers - first))
        layers = [layer_spec(spec, core_attention, None, space, **settings)] * held + layers[held:]
    with cpu_seam():
        model = model_class(
            config=config,
            transformer_layer_spec=TransformerBlockSubmodules(layers, RMSNorm),
            vocab_size=spec.padded_vocab_size(tensor),
            max_sequence_length=spec.rope.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            parallel_output=True,
            share_embeddings_and_output_weights=spec.tie_embeddings,
            position_embedding_type="none",
            **model_arguments,
        )
        if space is not None and pre_process:
            model.embedding.word_embeddings = SubspaceWordEmbedding(
                model.embedding.word_embeddings, space, spec.initializer_range, config
            )
    _mark_tensor_parallel(model)
    return model


def _mark_tensor_parallel(model: nn.Module) -> None:
    """Set the marks of mcore's own initialisation, by which gradient norm and checkpoints know shards."""
    for name, module in model.named_modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dim = 0
        elif isinstance(module, RowParallelLinear):
            dim = 1
        else:
            continue
        if module.weight is not None:
            stride = 2 if name.endswith("linear_fc1") else 1
            set_tensor_model_parallel_attributes(module.weight, True, dim, stride)
