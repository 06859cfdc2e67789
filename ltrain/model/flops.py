"""The one FLOP counter: multiply-adds count as 2, a backward pass as twice its forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ltrain.config.memory import MemoryLevel
from ltrain.model.spec import ModelSpec


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of training on some documents: `model` of the dense model, `executed` of what was computed."""

    model: float
    executed: float


def visible_pairs(length: int, window: int | None = None) -> int:
    """Pairs (query, key) that causal attention sees in a document; with a window, key > query - window."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def linear_flops_per_token(spec: ModelSpec) -> int:
    """Forward FLOPs of a token in all matrices, the output matrix included and the embedding lookup not."""
    return 2 * (spec.num_layers * spec.layer_matrix_parameters + spec.hidden_size * spec.vocab_size)


def pair_flops(spec: ModelSpec) -> int:
    """Forward FLOPs of one (query, key) pair in one layer: scores and weighted values of every head."""
    return 4 * spec.q_size


def attention_flops(spec: ModelSpec, lengths: Iterable[int]) -> list[int]:
    """Forward FLOPs of each layer's attention over documents of these lengths, dense up to the layer's
    window."""
    lengths = list(lengths)
    per_window = {w: pair_flops(spec) * sum(visible_pairs(n, w) for n in lengths) for w in set(spec.windows)}
    return [per_window[w] for w in spec.windows]


def step_flops(
    spec: ModelSpec,
    lengths: Sequence[int],
    *,
    densities: Sequence[float] | None = None,
    memory_level: MemoryLevel = "none",
    kept: Sequence[float] | None = None,
    mode: str = "qkv",
) -> StepFlops:
    """FLOPs of one forward and backward over documents of `lengths` tokens.

    `densities` is the fraction of visible pairs that attention computes, a number a layer; `kept` the
    fraction of tokens that token elimination keeps, and `mode` is its mode: `qkv` spares the projections,
    `layer` the MLP too, `q` neither (dropped tokens are keys), `backward` only the backward pass of
    projections and attention, and projects the kept tokens twice. `memory_level` says which products run
    twice forward (attention never does). Scoring the blocks is not counted.
    """
    tokens = sum(lengths)
    per_layer = attention_flops(spec, lengths)
    head = 2 * spec.hidden_size * spec.vocab_size * tokens
    linear = 2 * spec.layer_matrix_parameters * tokens
    model = 3 * (head + spec.num_layers * linear + sum(per_layer))
    densities = densities if densities is not None else [1.0] * spec.num_layers
    kept = kept if kept is not None else [1.0] * spec.num_layers
    executed: float = 3 * head
    projections = 2 * spec.attention_matrix_parameters * tokens
    again = memory_level in ("mlp", "full", "offload")
    gate_up_again = 2 * 2 * spec.hidden_size * spec.ffn_hidden_size * tokens if again else 0
    for layer, flops in enumerate(per_layer):
        passes = 4 if memory_level in ("full", "offload") else 3
        share, density = kept[layer], densities[layer]
        mlp = 3 * (linear - projections) + gate_up_again
        half = passes * projections * share + 3 * flops * density
        if mode == "layer":
            mlp *= share
        elif mode == "q" and share < 1:
            half = passes * projections + 3 * flops * density
        elif mode == "backward" and share < 1:
            half = projections * (1 + passes * share) + flops * (1 + 2 * density)
        executed += mlp + half
    return StepFlops(float(model), executed)


def model_flops(spec: ModelSpec, lengths: Sequence[int]) -> float:
    """Training FLOPs of the dense model over documents of `lengths` tokens."""
    return step_flops(spec, lengths).model


def flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Training FLOPs per token of the dense model on full sequences of `seq_len` tokens."""
    return step_flops(spec, [seq_len]).model / seq_len
