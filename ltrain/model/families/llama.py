"""Llama 2 and 3.x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltrain.config.base import ConfigError
from ltrain.config.model import NewModel
from ltrain.model.families.base import Family
from ltrain.model.spec import ModelSpec


class Llama(Family):
    """No norms on queries and keys, no windows; `attention_bias` is on all four projections or on none."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"

    def read_features(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        bias = bool(config.get("attention_bias", False))
        windows = (None,) * int(config.get("num_hidden_layers") or 0)
        return {"qkv_bias": bias, "o_bias": bias, "qk_norm": False, "windows": windows}

    def write_features(self, spec: ModelSpec) -> dict[str, Any]:
        return {"attention_bias": spec.qkv_bias, "mlp_bias": False}

    def new_features(self, config: NewModel) -> dict[str, Any]:
        if config.sliding_window:
            raise ConfigError("model.sliding_window", config.sliding_window, "is not a feature of llama")
        return {"qkv_bias": False, "o_bias": False, "qk_norm": False, "windows": (None,) * config.num_layers}
