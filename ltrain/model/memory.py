"""Memory of a run in closed form: parameters, gradients, optimizer state, activations, loss.

Letters of the formulas, all of one layer: E hidden size, Q and K rows of the query and of the key projection,
F MLP width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from ltrain.attention.patterns import Pattern
from ltrain.config.memory import MemoryLevel
from ltrain.config.model import LoraAdapter
from ltrain.model.layer_bytes import LayerBytes, saved_bytes
from ltrain.model.spec import ModelSpec

GIB = 1 << 30
LEVELS: tuple[MemoryLevel, ...] = get_args(MemoryLevel)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank: the fixed part, and the parts that grow with the tokens it holds.

    `workspace` is what one layer's backward pass holds beyond saved tensors; `host` lies in host memory.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float
    loss: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Of the device."""
        return (
            self.parameters + self.gradients + self.optimizer + self.activations + self.workspace + self.loss
        )


@dataclass(frozen=True)
class Setting:
    """What an estimate depends on beside the model and the tokens.

    `shards` ranks share the optimizer state (1 without the distributed optimizer). `trained`: parameters with
    gradients and optimizer state, None for all. `kept`: one share for each layer of the tokens that token
    elimination keeps in `mode`; empty without it. `pattern` of attention, in blocks of `block` tokens, on
    `context` ranks.
    """

    level: MemoryLevel = "none"
    bf16: bool = True
    tensor: int = 1
    sequence_parallel: bool = True
    pipeline: int = 1
    shards: int = 1
    loss_chunk_tokens: int = 1024
    adapter: LoraAdapter | None = None
    fused_norm: bool = True
    trained: int | None = None
    kept: Sequence[float] = ()
    mode: str = "qkv"
    pattern: Pattern | None = None
    block: int = 128
    context: int = 1

    @property
    def element(self) -> int:
        return 2 if self.bf16 else 4


def bytes_per_token_layer(spec: ModelSpec, setting: Setting) -> float:
    """Bytes saved a token and layer on the device, unsharded: the mean over layers."""
    kept = setting.kept or [1.0] * spec.num_layers
    return sum(_layer(spec, setting, i, share).total for i, share in enumerate(kept)) / len(kept)


def _layer(spec: ModelSpec, setting: Setting, number: int, kept: float) -> LayerBytes:
    pattern = setting.pattern
    if pattern is not None and pattern.is_dense_layer(number, spec.num_layers):
        pattern = None
    return saved_bytes(
        spec,
        setting.level,
        setting.element,
        kept=kept,
        mode=setting.mode,
        adapter=setting.adapter,
        fused_norm=setting.fused_norm,
        pattern=pattern,
        block=setting.block,
        context=setting.context,
    )


def estimate_memory(spec: ModelSpec, tokens: int, setting: Setting) -> MemoryEstimate:
    """Memory of a rank of the first pipeline stage that holds `tokens` tokens of a micro-batch.

    With pipeline parallelism that stage keeps the activations of as many micro-batches as there are stages.
    """
    tensor, pipeline, element = setting.tensor, setting.pipeline, setting.element
    count = spec.num_layers / pipeline * spec.layer_parameters
    count = (count + spec.embedding_parameters / (1 if pipeline == 1 else 2)) / tensor
    trained = count if setting.trained is None else setting.trained / pipeline / tensor
    kept = list(setting.kept or [1.0] * spec.num_layers)[: spec.num_layers // pipeline]
    layers = [_layer(spec, setting, number, share) for number, share in enumerate(kept)]
    saved = sum(layer.on_rank(tensor, setting.sequence_parallel) for layer in layers)
    head = min(tokens, setting.loss_chunk_tokens) * spec.padded_vocab_size(tensor) / tensor * (8 + element)
    output = 0 if setting.adapter is not None else spec.hidden_size * spec.vocab_size / tensor * 4
    return MemoryEstimate(
        parameters=count * element,
        gradients=trained * 4,
        optimizer=trained * (12 if setting.bf16 else 8) / setting.shards,
        activations=(saved * tokens + sum(layer.fixed for layer in layers) / tensor) * pipeline,
        workspace=workspace_bytes(spec, tokens, setting),
        loss=head + output + 2 * tokens * spec.hidden_size * element,
        host=sum(layer.host for layer in layers) * tokens * pipeline / tensor,
    )


def tile_tokens(hidden_size: int) -> int:
    """Tokens of one tile of the recomputed MLP: enough for products at full speed, and few enough that a
    tile's intermediates weigh about what the MLP's matrices do."""
    return max(1024, hidden_size)


def workspace_bytes(spec: ModelSpec, tokens: int, setting: Setting) -> float:
    """What the larger half of a layer holds in its backward pass beyond saved tensors.

    An estimate, right within a factor of two. MLP, for the tokens of a tile: gate and up and their gradient,
    the activation, its gradient and two products (8 F). Attention: q and k as they were, rotated and grouped,
    the gradients of the output, of q, k and v and of the projection (6 Q + 5 K), and the kernel's results and
    sums in fp32 (2 Q + 4 K). Both: the norm and the gradients of the residual (4 E).
    """
    e, q, k, f = spec.hidden_size, spec.q_size, spec.kv_size, spec.ffn_hidden_size
    tile = min(tokens, tile_tokens(e)) if setting.level in ("mlp", "full", "offload") else tokens
    # With `offload` two residuals are on their way back at a time.
    residual = (6 if setting.level == "offload" else 4) * e * setting.element * tokens
    mlp = 8 * f * setting.element * tile
    attention = (setting.element * (6 * q + 5 * k) + 4 * (2 * q + 4 * k)) * tokens
    if setting.level in ("full", "offload"):
        attention += setting.element * (q + 2 * k) * tokens
    return (
        residual / (setting.tensor if setting.sequence_parallel else 1) + max(mlp, attention) / setting.tensor
    )


def longest_context(spec: ModelSpec, budget_bytes: float, context: int, setting: Setting) -> int:
    """Tokens of the longest sequence whose share fits one rank of `context` that has `budget_bytes`; 0 if
    none."""
    low, high = 0, 1 << 32
    if estimate_memory(spec, 0, setting).total > budget_bytes:
        return 0
    while low < high - 1:
        middle = (low + high) // 2
        fits = estimate_memory(spec, middle, setting).total <= budget_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low * context


def levels(setting: Setting) -> list[Setting]:
    """The same setting at every memory level."""
    return [replace(setting, level=level) for level in LEVELS]
