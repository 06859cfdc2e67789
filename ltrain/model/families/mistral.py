"""Mistral 7B and its relatives with the same architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltrain.config.base import ConfigError
from ltrain.config.model import NewModel
from ltrain.model.families.base import Family
from ltrain.model.spec import ModelSpec


class Mistral(Family):
    """No biases, no norms on queries and keys; one window for every layer, or none."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"

    def read_features(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        if config.get("layer_types"):
            raise ConfigError(f"{where}: layer_types", "(given)", "is not supported for mistral")
        windows = (config.get("sliding_window"),) * int(config.get("num_hidden_layers") or 0)
        return {"qkv_bias": False, "o_bias": False, "qk_norm": False, "windows": windows}

    def write_features(self, spec: ModelSpec) -> dict[str, Any]:
        return {"sliding_window": spec.windows[0]}

    def new_features(self, config: NewModel) -> dict[str, Any]:
        windows = (config.sliding_window,) * config.num_layers
        return {"qkv_bias": False, "o_bias": False, "qk_norm": False, "windows": windows}
