"""Bytes that one layer saves for its backward pass, in closed form, for every memory level and with token
elimination.

Letters of the formulas: E hidden size, Q and K rows of the query and of the key projection, F MLP width, N
query heads, b bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ltrain.attention.patterns import Pattern
from ltrain.attention.patterns.base import Widths
from ltrain.config.memory import MemoryLevel
from ltrain.config.model import LoraAdapter
from ltrain.model.spec import ModelSpec


@dataclass(frozen=True)
class LayerBytes:
    """Bytes that one layer saves for its backward pass, a token.

    `residual` is split over tensor-parallel ranks with sequence parallelism only, `parallel` always; `host`
    lies in host memory. `fixed`, split too, does not grow with the tokens.
    """

    residual: float = 0.0
    parallel: float = 0.0
    host: float = 0.0
    fixed: float = 0.0

    @property
    def total(self) -> float:
        """Of the device, unsharded."""
        return self.residual + self.parallel

    def on_rank(self, tensor: int, sequence_parallel: bool) -> float:
        return self.residual / (tensor if sequence_parallel else 1) + self.parallel / tensor

    def __add__(self, other: LayerBytes) -> LayerBytes:
        return LayerBytes(
            self.residual + other.residual,
            self.parallel + other.parallel,
            self.host + other.host,
            self.fixed + other.fixed,
        )

    def __mul__(self, share: float) -> LayerBytes:
        """The bytes of a layer in which a share of the tokens takes part."""
        return LayerBytes(share * self.residual, share * self.parallel, share * self.host, self.fixed)


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
    qk-norm, for attention and MLP:

        norms    b (E + 2 Q + 2 K) + 4 N  and  b (E + 2 F)
        mlp      b (E + 2 Q + 2 K) + 4 N  and  b E
        full     b (E + Q) + 4 N          and  nothing
        offload  as full, b E of it in host memory

    Where token elimination keeps the share `kept` < 1 of the tokens, a half saves that share: attention's
    (`mode` qkv and backward), both (layer), or none (q). The exception is the residual at `full` and
    `offload`, which both halves need: in qkv and backward it is saved whole. Except in q, 8 bytes a kept
    token are added for the row numbers.

    `none` follows mcore's operations; there `adapter` says which linears save no input, `fused_norm` whether
    the norm is one operation (on a GPU) or several, which save more (on a CPU), and the rotary tables of kept
    tokens, 4 bytes a head's feature, are saved. Rotary tables that all layers share and a dynamic pattern's
    index are not counted.

    A layer of a learned `pattern`, in blocks of `block` tokens on `context` ranks, saves besides:

        nsa        b (2 Q + 3 N) + 8 N, and from other ranks 2 b K context / compress
        seer_gate  6 b K gate_dim, whatever the tokens

    and at `none` what `Pattern.saved_bytes` says.
    """
    sparse = kept < 1 and mode != "q"
    if level == "none":
        # The gather of kept rows and the norm are one operation in mode qkv.
        gathered = sparse and mode == "qkv"
        attention = _stock_attention(spec, element, adapter, fused_norm, gathered)
        mlp = _stock_mlp(spec, element, adapter, fused_norm)
    else:
        attention, mlp = _lean_halves(spec, level, element)
    if pattern is not None:
        widths = Widths(spec.num_heads, spec.num_kv_heads, spec.head_dim, element, block, context)
        token, fixed = pattern.saved_bytes(widths, lean=level != "none")
        attention += LayerBytes(parallel=token, fixed=fixed)
    if not sparse:
        return attention + mlp
    rows = LayerBytes(residual=(8 + (4 * spec.head_dim if level == "none" else 0)) * kept)
    if mode == "layer":
        return (attention + mlp) * kept + rows
    if level in ("full", "offload"):
        return replace(attention, parallel=attention.parallel * kept) + mlp + rows
    return attention * kept + mlp + rows


def _lean_halves(spec: ModelSpec, level: MemoryLevel, element: int) -> tuple[LayerBytes, LayerBytes]:
    e, q, k, f = (element * n for n in (spec.hidden_size, spec.q_size, spec.kv_size, spec.ffn_hidden_size))
    lse = 4 * spec.num_heads
    if level == "full":
        return LayerBytes(residual=e, parallel=q + lse), LayerBytes()
    if level == "offload":
        return LayerBytes(parallel=q + lse, host=e), LayerBytes()
    attention = LayerBytes(residual=e, parallel=2 * q + 2 * k + lse)
    return attention, LayerBytes(residual=e, parallel=2 * f if level == "norms" else 0)


def _stock_attention(
    spec: ModelSpec, element: int, adapter: LoraAdapter | None, fused_norm: bool, gathered: bool
) -> LayerBytes:
    """What mcore's layer saves around our attention: the norm's input and output (2 E), the fused projection
    (Q + 2 K) and the rotated q and k (Q + K), attention's output (Q), statistics.

    Frozen linears save no input. `gathered`: the norm is ours, of gathered rows: one operation, whose
    statistics only a GPU saves.
    """
    e, q, k = spec.hidden_size, spec.q_size, spec.kv_size
    needs_input, lora = _saved_inputs(adapter)
    trained_norms = _trains_norms(adapter)
    norm = _norm_bytes(e, 1, element, fused_norm, trained_norms)
    if gathered:
        norm = element * e + (4 if fused_norm else 0)
    parallel = element * (3 * q + 3 * k) + 4 * spec.num_heads
    if spec.qk_norm:
        # The key's norm reads the fused projection; the query's reads a copy, saved unless it is upcast.
        heads = spec.num_heads + spec.num_kv_heads
        norms = _norm_bytes(q + k, heads, element, fused_norm, trained_norms)
        parallel += norms - (element * k if fused_norm or element == 4 else 0)
    return LayerBytes(norm + element * (e * needs_input["qkv"] + lora["qkv"] + lora["o"]), parallel)


def _stock_mlp(spec: ModelSpec, element: int, adapter: LoraAdapter | None, fused_norm: bool) -> LayerBytes:
    """What mcore's MLP half saves: the norm's input and output (2 E), gate and up (2 F), silu(gate), up and
    their product (3 F), the norm's statistics. Frozen linears save no input.
    """
    e, f = spec.hidden_size, spec.ffn_hidden_size
    needs_input, lora = _saved_inputs(adapter)
    norm = _norm_bytes(e, 1, element, fused_norm, _trains_norms(adapter))
    residual = norm + element * (e * needs_input["gate_up"] + lora["gate_up"] + lora["down"])
    return LayerBytes(residual, element * (4 + needs_input["down"]) * f)


def _saved_inputs(adapter: LoraAdapter | None) -> tuple[dict[str, bool], dict[str, int]]:
    """By linear: whether its input is saved, and the width of its adapter's inner values."""
    names = ("qkv", "o", "gate_up", "down")
    if adapter is None:
        return dict.fromkeys(names, True), dict.fromkeys(names, 0)
    inside = {name: name in adapter.targets for name in names}
    return inside, {name: adapter.rank * inside[name] for name in names}


def _trains_norms(adapter: LoraAdapter | None) -> bool:
    return adapter is None or any("norm" in pattern for pattern in adapter.also_train)


def _norm_bytes(width: int, groups: int, element: int, fused: bool, trained: bool) -> float:
    """Saved by RMSNorm over `width` values a token in `groups` groups: its input and, in fp32, 1 / rms.

    As several operations it saves the input in fp32 and, for the weight, the normalised input in fp32 too.
    """
    if fused:
        return element * width + 4 * groups
    return 4 * width * (2 if trained else 1) + 4 * groups
