"""What all families share: the reading and writing of config.json, and the names of the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ltrain.attention.rope import Rope
from ltrain.config.base import ConfigError
from ltrain.config.model import NewModel
from ltrain.model.spec import ModelSpec

DTYPES = ("float32", "bfloat16", "float16")


class Family:
    """A model family of `transformers`: subclass it in a file of its own and list it in `families/__init__`.

    Subclasses name `model_type` and `architecture` and override `read_features`, `write_features` and
    `new_features` for what differs: biases, query/key norms, sliding windows.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    default_head_dim: ClassVar[int | None] = None

    def read_features(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        """ModelSpec's qkv_bias, o_bias, qk_norm and windows from config.json."""
        raise NotImplementedError

    def write_features(self, spec: ModelSpec) -> dict[str, Any]:
        """The same, as fields of config.json."""
        raise NotImplementedError

    def new_features(self, config: NewModel) -> dict[str, Any]:
        """The same, for a model that is made from the YAML."""
        raise NotImplementedError

    def read(self, config: Mapping[str, Any], source: Path) -> ModelSpec:
        """The spec of a config.json. Raises ConfigError on anything missing or unsupported, by name."""
        where = str(source / "config.json")
        self._refuse(config, where)

        def integer(name: str, default: int | None = None) -> int:
            value = config.get(name)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{where}: {name}", value, "must be a positive integer")
            return value

        heads = integer("num_attention_heads")
        hidden = integer("hidden_size")
        head_dim = integer("head_dim", self.default_head_dim or hidden // heads)
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
        if dtype not in DTYPES:
            raise ConfigError(f"{where}: dtype", dtype, f"must be one of {', '.join(DTYPES)}")
        return ModelSpec(
            family=self.model_type,
            hidden_size=hidden,
            num_layers=integer("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=integer("num_key_value_heads", heads),
            head_dim=head_dim,
            ffn_hidden_size=integer("intermediate_size"),
            vocab_size=integer("vocab_size"),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            rope=Rope.from_hf(config, head_dim, source=where),
            initializer_range=float(config.get("initializer_range", 0.02)),
            dtype=dtype,
            source=source,
            **self.read_features(config, where),
        )

    def new(self, config: NewModel, vocab_size: int) -> ModelSpec:
        """The spec of a new model."""
        if config.head_dim is None and config.hidden_size % config.num_heads:
            rule = f"must be a multiple of model.num_heads={config.num_heads}"
            raise ConfigError("model.hidden_size", config.hidden_size, rule, "or give model.head_dim")
        head_dim = config.head_dim or config.hidden_size // config.num_heads
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        return ModelSpec(
            family=self.model_type,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads or config.num_heads,
            head_dim=head_dim,
            ffn_hidden_size=config.ffn_hidden_size,
            vocab_size=vocab_size,
            norm_eps=config.norm_eps,
            tie_embeddings=config.tie_embeddings,
            rope=Rope(rope, head_dim, config.max_position_embeddings, config.max_position_embeddings),
            initializer_range=config.initializer_range,
            **self.new_features(config),
        )

    def write(self, spec: ModelSpec) -> dict[str, Any]:
        """A whole config.json, without rope and dtype."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.ffn_hidden_size,
            "num_hidden_layers": spec.num_layers,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "hidden_act": "silu",
            "initializer_range": spec.initializer_range,
            "rms_norm_eps": spec.norm_eps,
            "tie_word_embeddings": spec.tie_embeddings,
            "attention_dropout": 0.0,
            "use_cache": True,
            **self.write_features(spec),
        }

    def _refuse(self, config: Mapping[str, Any], where: str) -> None:
        architectures = config.get("architectures") or [self.architecture]
        if self.architecture not in architectures:
            raise ConfigError(f"{where}: architectures", architectures, f"must hold {self.architecture}")
        if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise ConfigError(f"{where}: hidden_act", activation, "is not supported", "only silu is")
        for name in (
            "mlp_bias",
            "attention_dropout",
            "quantization_config",
            "num_experts",
            "num_local_experts",
        ):
            if config.get(name):
                raise ConfigError(
                    f"{where}: {name}", config[name], "is not supported", "it must be absent or 0"
                )


def layer_windows(config: Mapping[str, Any], where: str) -> tuple[int | None, ...]:
    """Windows of a family with `layer_types`, or the older `use_sliding_window` and `max_window_layers`."""
    num_layers = int(config.get("num_hidden_layers") or 0)
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        return tuple(window if i >= first else None for i in range(num_layers))
    if unknown := set(types) - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"{where}: layer_types", sorted(unknown), "are not supported")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def windows_fields(spec: ModelSpec) -> dict[str, Any]:
    """The reverse of `layer_windows`."""
    sizes = {w for w in spec.windows if w is not None}
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": next(iter(sizes), None),
        "max_window_layers": next((i for i, w in enumerate(spec.windows) if w is not None), spec.num_layers),
        "layer_types": ["sliding_attention" if w is not None else "full_attention" for w in spec.windows],
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ConfigError."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError("model.path", str(path), f"cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError("model.path", str(path), f"is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError("model.path", str(path), "must hold a JSON object")
    return data
