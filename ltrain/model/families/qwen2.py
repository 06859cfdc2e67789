"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltrain.config.model import NewModel
from ltrain.model.families.base import Family, layer_windows, windows_fields
from ltrain.model.spec import ModelSpec


class Qwen2(Family):
    """Biases on queries, keys and values, none on the output; windows by layer."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"

    def read_features(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        windows = layer_windows(config, where)
        return {"qkv_bias": True, "o_bias": False, "qk_norm": False, "windows": windows}

    def write_features(self, spec: ModelSpec) -> dict[str, Any]:
        return windows_fields(spec)

    def new_features(self, config: NewModel) -> dict[str, Any]:
        windows = (config.sliding_window,) * config.num_layers
        return {"qkv_bias": True, "o_bias": False, "qk_norm": False, "windows": windows}
