"""Which model is trained and which of its parameters: the `model` section, a union by `kind`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from ltrain.config.base import ConfigError, Section

FamilyName = Literal["llama", "qwen2", "qwen3", "mistral"]
LoraTarget = Literal["qkv", "o", "gate_up", "down"]


class NoAdapter(Section):
    """Every parameter that `freeze` doesn't name is trained."""

    kind: Literal["none"] = "none"


class LoraAdapter(Section):
    """Low-rank adaptation (arXiv 2106.09685): y = W x + alpha / rank * B A x, with W frozen.

    Everything but A and B is frozen, except the parameters that `also_train` names.
    """

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 16
    """Rows of A, columns of B."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank."""
    targets: tuple[LoraTarget, ...] = ("qkv", "o")
    """Linears that get an adapter: `qkv` is one linear for queries, keys and values, `gate_up` one for both.
    """
    also_train: tuple[str, ...] = ()
    """Patterns of Hugging Face parameter names that stay trained beside the adapter, for example
    `*embed_tokens*` and `*norm*` (LongLoRA, arXiv 2309.12307)."""

    @model_validator(mode="after")
    def _check(self) -> LoraAdapter:
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ConfigError(
                "model.adapter.targets", self.targets, "must name at least one linear, each once"
            )
        return self


AdapterConfig = Annotated[NoAdapter | LoraAdapter, Field(discriminator="kind")]


class _Model(Section):
    adapter: AdapterConfig = NoAdapter()
    """Train low-rank adapters instead of the weights."""
    freeze: tuple[str, ...] = ()
    """Patterns (`*` and `?`) of Hugging Face parameter names that are not trained, for example `*mlp*`.
    Query, key and value, and gate and up, are one parameter each in training: name both or none."""


class HFModel(_Model):
    """A Hugging Face checkpoint: a folder with config.json and safetensors."""

    kind: Literal["hf"] = "hf"
    path: Path
    """The folder."""


class NewModel(_Model):
    """A new model with random weights; they depend on `run.seed` only, not on how the model is sharded."""

    kind: Literal["new"] = "new"
    family: FamilyName = "llama"
    """Architecture; it decides about biases and query/key norms as the family's published models do."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    num_layers: PositiveInt
    """Number of transformer layers."""
    num_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key/value heads; as many as query heads where absent."""
    head_dim: PositiveInt | None = None
    """Size of a head; hidden_size / num_heads where absent."""
    ffn_hidden_size: PositiveInt
    """Width of the gated MLP."""
    vocab_size: PositiveInt | None = None
    """Number of tokens; the tokenizer's where absent."""
    max_position_embeddings: PositiveInt
    """Context of the new model before `rope` changes it."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in RMSNorm."""
    tie_embeddings: bool = False
    """Use the token embedding as output matrix too."""
    sliding_window: PositiveInt | None = None
    """Every layer sees this many tokens back, itself included (mistral, qwen2, qwen3)."""
    initializer_range: NonNegativeFloat = 0.02
    """Standard deviation of the weights."""


ModelConfig = Annotated[HFModel | NewModel, Field(discriminator="kind")]
