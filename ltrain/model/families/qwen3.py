"""Qwen3 (dense)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltrain.config.model import NewModel
from ltrain.model.families.base import Family, layer_windows, windows_fields
from ltrain.model.spec import ModelSpec


class Qwen3(Family):
    """RMSNorm on every head's queries and keys; `attention_bias` is on all four projections or on none."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    default_head_dim = 128

    def read_features(self, config: Mapping[str, Any], where: str) -> dict[str, Any]:
        bias = bool(config.get("attention_bias", False))
        windows = layer_windows(config, where)
        return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True, "windows": windows}

    def write_features(self, spec: ModelSpec) -> dict[str, Any]:
        return {"attention_bias": spec.qkv_bias, **windows_fields(spec)}

    def new_features(self, config: NewModel) -> dict[str, Any]:
        windows = (config.sliding_window,) * config.num_layers
        return {"qkv_bias": False, "o_bias": False, "qk_norm": True, "windows": windows}
