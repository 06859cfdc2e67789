"""Rotary position embedding: one value owns the frequencies and the Hugging Face fields they are exported as.

Frequencies come from `transformers`' own functions, fed with the very fields that are exported, so the two
cannot drift apart. cos and sin follow from explicit positions (any order, any document).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ltrain.config.base import ConfigError
from ltrain.config.rope import (
    AbfRope,
    DynamicRope,
    KeepRope,
    LinearRope,
    Llama3Rope,
    LongRope,
    NtkRope,
    RopeConfig,
    YarnRope,
)

# B batch, T tokens, H heads, D head dim

_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
    "longrope": {
        "short_factor",
        "long_factor",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
    },
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
_NEEDED = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor"},
    "longrope": {"short_factor", "long_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model.

    `parameters` is `rope_parameters` of a Hugging Face config; `max_position_embeddings` goes with it.
    `seq_len` is the context that the tables are for: `dynamic` and `longrope` have other frequencies for
    other lengths.
    """

    parameters: Mapping[str, Any]
    head_dim: int
    max_position_embeddings: int
    seq_len: int

    @staticmethod
    def from_hf(config: Mapping[str, Any], head_dim: int, *, source: str = "config.json") -> Rope:
        """Read `rope_parameters`, or the older `rope_theta` and `rope_scaling`. Raises ConfigError."""
        length = config.get("max_position_embeddings")
        if not isinstance(length, int) or length < 1:
            raise ConfigError(f"{source}: max_position_embeddings", length, "must be a positive integer")
        raw = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        field = f"{source}: {'rope_parameters' if config.get('rope_parameters') else 'rope_scaling'}"
        if any(isinstance(value, Mapping) for value in raw.values()):
            raise ConfigError(field, sorted(raw), "differs by layer type, which is not supported")
        kind = raw.pop("rope_type", None) or raw.get("type") or "default"
        raw.pop("type", None)
        kind = {"su": "longrope"}.get(kind, kind)
        partial = raw.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
        if partial != 1.0:
            raise ConfigError(
                f"{source}: partial_rotary_factor", partial, "must be 1: partial rotation is not supported"
            )
        if head_dim % 2:
            raise ConfigError(f"{source}: head_dim", head_dim, "must be even for rotary embeddings")
        if kind not in _FIELDS:
            raise ConfigError(f"{field}.rope_type", kind, f"must be one of {', '.join(_FIELDS)}")
        theta = raw.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
        raw = {name: value for name, value in raw.items() if value is not None}
        if unknown := set(raw) - _FIELDS[kind] - {"original_max_position_embeddings"}:
            raise ConfigError(field, sorted(unknown), f"are not fields of rope_type {kind}")
        if missing := _NEEDED.get(kind, set()) - set(raw):
            raise ConfigError(field, sorted(missing), f"must be given for rope_type {kind}")
        if "original_max_position_embeddings" in _FIELDS[kind]:
            outer = config.get("original_max_position_embeddings")
            raw.setdefault("original_max_position_embeddings", outer or length)
        else:
            raw.pop("original_max_position_embeddings", None)
        parameters = {"rope_type": kind, "rope_theta": float(theta), **raw}
        return Rope(parameters, head_dim, length, length)

    @property
    def original_length(self) -> int:
        """The context before any stretching that these parameters describe."""
        return int(self.parameters.get("original_max_position_embeddings", self.max_position_embeddings))

    def extend(self, change: RopeConfig, seq_len: int) -> Rope:
        """This embedding changed for sequences of `seq_len` tokens.

        Raises ConfigError where the change as configured does not reach `seq_len`.
        """
        base = self.original_length
        longest = max(seq_len, self.max_position_embeddings)
        given = {
            name: value for name, value in change.model_dump(exclude={"kind"}).items() if value is not None
        }
        theta = float(given.pop("theta", self.parameters["rope_theta"]))
        ratio = float(given.get("factor") or max(1.0, seq_len / base))
        fresh: dict[str, Any] = {"rope_type": change.kind, "rope_theta": theta}
        match change:
            case KeepRope():
                return replace(self, max_position_embeddings=self._kept_length(longest), seq_len=seq_len)
            case AbfRope():
                kept = replace(self, parameters={**self.parameters, "rope_theta": theta}, seq_len=seq_len)
                return replace(kept, max_position_embeddings=self._kept_length(longest))
            case NtkRope():
                ratio = float(given.get("factor") or max(1.0, seq_len / self.max_position_embeddings))
                theta *= ratio ** (self.head_dim / (self.head_dim - 2))
                reach = math.ceil(self.max_position_embeddings * ratio)
                result = replace(self, parameters={**self.parameters, "rope_theta": theta}, seq_len=seq_len)
                result = replace(result, max_position_embeddings=reach)
            case LinearRope():
                result = Rope({**fresh, "factor": ratio}, self.head_dim, math.ceil(base * ratio), seq_len)
            case DynamicRope():
                # transformers scales beyond max_position_embeddings, so that field keeps the old context.
                return Rope({**fresh, "factor": ratio}, self.head_dim, base, seq_len)
            case YarnRope():
                base = change.original_max_position_embeddings or base
                ratio = float(change.factor or max(1.0, seq_len / base))
                fields = {**fresh, **given, "factor": ratio, "original_max_position_embeddings": base}
                result = Rope(fields, self.head_dim, math.ceil(base * ratio), seq_len)
            case LongRope():
                base = change.original_max_position_embeddings or base
                ratio = float(change.factor or max(1.0, seq_len / base))
                given.pop("factors")
                fields = {**fresh, **given, **self._read_factors(change)}
                fields |= {"factor": ratio, "original_max_position_embeddings": base}
                result = Rope(fields, self.head_dim, math.ceil(base * ratio), seq_len)
            case Llama3Rope():
                base = change.original_max_position_embeddings or base
                ratio = float(change.factor or max(1.0, seq_len / base))
                fields = {**fresh, **given, "factor": ratio, "original_max_position_embeddings": base}
                return Rope(fields, self.head_dim, max(longest, base + 1), seq_len)
        if result.max_position_embeddings < seq_len:
            raise ConfigError(
                "rope.factor",
                ratio,
                f"reaches {result.max_position_embeddings} positions and must cover train.seq_len={seq_len}",
                f"use at least {seq_len / (result.max_position_embeddings / ratio):g}",
            )
        return result

    def _kept_length(self, longest: int) -> int:
        return self.max_position_embeddings if self.parameters["rope_type"] == "dynamic" else longest

    def _read_factors(self, change: LongRope) -> dict[str, list[float]]:
        try:
            lists = json.loads(change.factors.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError("rope.factors", str(change.factors), f"cannot be read: {error}") from None
        result = {}
        for name in ("short_factor", "long_factor"):
            values = lists.get(name) if isinstance(lists, dict) else None
            if (
                not isinstance(values, list)
                or len(values) != self.head_dim // 2
                or not all(isinstance(v, int | float) and not isinstance(v, bool) and v > 0 for v in values)
            ):
                rule = f"must hold {name}, a list of head_dim / 2 = {self.head_dim // 2} positive numbers"
                raise ConfigError("rope.factors", str(change.factors), rule)
            result[name] = [float(v) for v in values]
        return result

    def to_hf(self) -> dict[str, Any]:
        """The fields `rope_parameters` and `max_position_embeddings` of a Hugging Face config."""
        return {
            "rope_parameters": dict(self.parameters),
            "max_position_embeddings": self.max_position_embeddings,
        }

    def frequencies(self, seq_len: int | None = None) -> tuple[Tensor, float]:
        """Inverse frequencies fp32 [D/2] on the CPU, and the factor on cos and sin, for sequences of
        `seq_len`."""
        kind = self.parameters["rope_type"]
        if kind == "default":
            exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float) / self.head_dim
            return 1.0 / (self.parameters["rope_theta"] ** exponent), 1.0
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = LlamaConfig(
            hidden_size=self.head_dim,
            num_attention_heads=1,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters=dict(self.parameters),
        )
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](
            config, torch.device("cpu"), seq_len=seq_len or self.seq_len
        )
        return inv_freq.float(), float(scaling)

    def tables(self, positions: Tensor, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 [..., T, D/2], of integer `positions` [..., T], with the attention factor
        applied."""
        device = torch.device(device) if device is not None else positions.device
        inv_freq, scaling = self.frequencies()
        angles = positions.to(device=device, dtype=torch.float32).unsqueeze(-1) * inv_freq.to(device)
        return angles.cos() * scaling, angles.sin() * scaling


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, D] by cos, sin fp32 [T, D/2] or [B, T, D/2]; dimension i pairs with i + D/2.

    Computes in fp32 and returns x's dtype. The pairing is that of Hugging Face checkpoints.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
