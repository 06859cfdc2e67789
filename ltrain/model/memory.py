"""Memory of a run in closed form: parameters, gradients, optimizer state, activations, loss.

Letters of the formulas, all of one layer: E hidden size, Q and K rows of the query and of the key projection,
F MLP width, N query heads, b bytes of an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from ltrain.attention.patterns import Pattern
from ltrain.attention.patterns.base import Widths
from ltrain.config.memory import MemoryLevel
from ltrain.config.model import LoraAdapter
from ltrain.model.spec import ModelSpec

GIB = 1 << 30
LEVELS: tuple[MemoryLevel, ...] = get_args(MemoryLevel)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one layer saves for its backward pass, a token.

    `residual` is split over tensor-parallel ranks with sequence parallelism only, `parallel` always; `host`
    lies in host memory. `fixed`, split too, does not grow with the tokens.
    """

    residual: float
    parallel: float
    host: float = 0.0
    fixed: float = 0.0

    @property
    def total(self) -> float:
        """Of the device, unsharded."""
        return self.residual + self.parallel

    def on_rank(self, tensor: int, sequence_parallel: bool) -> float:
        return self.residual / (tensor if sequence_parallel else 1) + self.parallel / tensor


def saved_bytes(
    spec: ModelSpec,
    level: MemoryLevel,
    element: int,
    *,
    kept: float = 1.0,
    mode: str = "qkv",
    adapter: LoraAdapter | None = None,
    fused_norm: bool = True,
    pattern: Pattern | None = None,
    block: int = 128,
    context: int = 1,
) -> LayerBytes:
    """Bytes saved by a layer at `level`, from tensors of `element` bytes.

    At the levels of our own layer, the same for full fine-tuning and adapters, with or without biases and
    qk-norm:

        norms    b (2 E + 2 Q + 2 K + 2 F) + 4 N
        mlp      b (2 E + 2 Q + 2 K) + 4 N
        full     b (E + Q) + 4 N
        offload  as full, b E of it in host memory

    Where token elimination keeps the share `kept` < 1 of the tokens, attention's input, qkv, output and LSE
    are those of kept tokens (`mode` qkv and backward), the MLP's too (layer), or none is spared (q); the
    MLP's input is saved at every level, and 8 bytes a kept token for the row numbers.

    `none` follows mcore's operations; there `adapter` says which linears save no input, and `fused_norm`
    whether the norm is one operation (on a GPU) or several, which save more (on a CPU); `kept` doesn't count.
    Rotary tables, shared by all layers, and a dynamic pattern's index are not counted.

    A layer of a learned `pattern`, in blocks of `block` tokens on `context` ranks, saves besides:

        nsa        b (2 Q + 3 N) + 8 N, and from other ranks 2 b K context / compress
        seer_gate  6 b K gate_dim, whatever the tokens

    and at `none` what `Pattern.saved_bytes` says.
    """
    if level == "none":
        layer = _stock_bytes(spec, element, adapter, fused_norm)
    else:
        layer = _lean_bytes(spec, level, element, kept, mode)
    if pattern is None:
        return layer
    widths = Widths(spec.num_heads, spec.num_kv_heads, spec.head_dim, element, block, context)
    token, fixed = pattern.saved_bytes(widths, lean=level != "none")
    return replace(layer, parallel=layer.parallel + token, fixed=fixed)


def _lean_bytes(spec: ModelSpec, level: MemoryLevel, element: int, kept: float, mode: str) -> LayerBytes:
    e, q, k, f = (element * n for n in (spec.hidden_size, spec.q_size, spec.kv_size, spec.ffn_hidden_size))
    attended = 1.0 if mode == "q" else kept
    through_mlp = kept if mode == "layer" else 1.0
    lean = level in ("norms", "mlp")
    parallel = attended * ((2 * q + 2 * k if lean else q) + 4 * spec.num_heads)
    if level == "norms":
        parallel += through_mlp * 2 * f
    residual, host = (0.0, attended * e) if level == "offload" else (attended * e, 0.0)
    if lean or kept < 1:
        residual += through_mlp * e
    if kept < 1 and mode != "q":
        residual += 8 * kept
    return LayerBytes(residual, parallel, host)


def _stock_bytes(spec: ModelSpec, element: int, adapter: LoraAdapter | None, fused_norm: bool) -> LayerBytes:
    """What mcore's layer saves around our attention.

    Both norms' inputs (2 E) and outputs (2 E), the fused projection (Q + 2 K) and the rotated q and k
    (Q + K), attention's output (Q), gate and up (2 F), silu(gate), up and their product (3 F), statistics.
    Frozen linears save no input.
    """
    e, q, k, f = spec.hidden_size, spec.q_size, spec.kv_size, spec.ffn_hidden_size
    targets = () if adapter is None else adapter.targets
    needs_input = {name: adapter is None or name in targets for name in ("qkv", "gate_up", "down")}
    trained_norms = adapter is None or any("norm" in pattern for pattern in adapter.also_train)
    residual = element * e * (needs_input["qkv"] + needs_input["gate_up"])
    residual += 2 * _norm_bytes(e, 1, element, fused_norm, trained_norms)
    parallel = element * (3 * q + 3 * k + (4 + needs_input["down"]) * f) + 4 * spec.num_heads
    if spec.qk_norm:
        # The key's norm reads the fused projection; the query's reads a copy, saved unless it is upcast.
        heads = spec.num_heads + spec.num_kv_heads
        norms = _norm_bytes(q + k, heads, element, fused_norm, trained_norms)
        parallel += norms - (element * k if fused_norm or element == 4 else 0)
    if adapter is not None:
        residual += element * adapter.rank * len(targets)
    return LayerBytes(residual, parallel)


def _norm_bytes(width: int, groups: int, element: int, fused: bool, trained: bool) -> float:
    """Saved by RMSNorm over `width` values a token in `groups` groups: its input and, in fp32, 1 / rms.

    As several operations it saves the input in fp32 and, for the weight, the normalised input in fp32 too.
    """
    if fused:
        return element * width + 4 * groups
    return 4 * width * (2 if trained else 1) + 4 * groups


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
