"""What a model is, independent of how it is stored or sharded: `ModelSpec`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from ltrain.attention.rope import Rope
from ltrain.config.base import ConfigError


@dataclass(frozen=True)
class Reparametrisation:
    """Residual writers and token embedding of all layers but the last `free_layers` write into a subspace.

    The subspace is `ltrain.parallel.stage_link.Subspace` of this `rank` and `seed`.
    """

    rank: int
    seed: int
    free_layers: int


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer with RMSNorm, rotary embeddings and a gated SiLU MLP.

    `windows` holds one entry a layer: None, or how many tokens a token sees, itself included. `source` is the
    folder it was read from, None for a new model. `dtype` names the type of the stored weights.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: Rope
    initializer_range: float = 0.02
    dtype: str = "float32"
    source: Path | None = None
    subspace: Reparametrisation | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            rule = f"must divide the number of query heads, {self.num_heads}"
            raise ConfigError("model.num_kv_heads", self.num_kv_heads, rule)
        if self.head_dim % 2:
            raise ConfigError("model.head_dim", self.head_dim, "must be even for rotary embeddings")
        if len(self.windows) != self.num_layers:
            rule = f"must hold one entry for each of {self.num_layers} layers"
            raise ConfigError("model.layer_types", len(self.windows), rule)
        if self.rope.head_dim != self.head_dim:
            raise ValueError(f"rope is for head_dim {self.rope.head_dim}, not {self.head_dim}")

    @property
    def q_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def attention_matrix_parameters(self) -> int:
        """Weights of one layer's attention projections."""
        return self.hidden_size * (2 * self.q_size + 2 * self.kv_size)

    @property
    def layer_matrix_parameters(self) -> int:
        """Weights of one layer's matrices: each costs 2 FLOPs a token in a forward pass."""
        return self.attention_matrix_parameters + 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def layer_parameters(self) -> int:
        """All parameters of one layer."""
        biases = self.qkv_bias * (self.q_size + 2 * self.kv_size) + self.o_bias * self.hidden_size
        norms = 2 * self.hidden_size + self.qk_norm * 2 * self.head_dim
        return self.layer_matrix_parameters + biases + norms

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding and of the output matrix, counted once if tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    @property
    def num_parameters(self) -> int:
        """All parameters, without the padding of the vocabulary."""
        return self.num_layers * self.layer_parameters + self.embedding_parameters + self.hidden_size

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of the embedding when it is split over `tensor_parallel` ranks."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel

    def check_parallel(self, *, tensor: int, pipeline: int) -> None:
        """Raise ConfigError where this model can't be split so."""
        for name, size in (
            ("num_kv_heads", self.num_kv_heads),
            ("num_heads", self.num_heads),
            ("ffn_hidden_size", self.ffn_hidden_size),
        ):
            if size % tensor:
                rule = f"must divide the model's {name}={size}"
                raise ConfigError(
                    "parallel.tensor", tensor, rule, "use a smaller degree, or context parallelism"
                )
        if self.num_layers % pipeline:
            rule = f"must divide the model's number of layers, {self.num_layers}"
            raise ConfigError("parallel.pipeline", pipeline, rule)


def model_facts(spec: ModelSpec) -> dict[str, object]:
    """What must agree for a checkpoint, or another replica, to fit the model, by name."""
    names = [
        "family",
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "ffn_hidden_size",
    ]
    names += ["vocab_size", "tie_embeddings", "qkv_bias", "qk_norm"]
    facts = {name: getattr(spec, name) for name in names}
    return facts | (vars(spec.subspace) if spec.subspace is not None else {})


def model_fingerprint(spec: ModelSpec) -> str:
    """A hash of `model_facts`."""
    return hashlib.sha256(json.dumps(list(model_facts(spec).values())).encode()).hexdigest()[:16]
