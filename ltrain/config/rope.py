"""How the rotary position embedding is changed for a longer context: the `rope` section, a union by `kind`.

Sources: linear interpolation arXiv 2306.15595; YaRN, and NTK-aware scaling that it describes, arXiv
2309.00071; LongRoPE arXiv 2402.13753; a raised base (ABF) arXiv 2309.16039; llama3 as in the Llama 3.1
release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ltrain.config.base import ConfigError, Section

Factor = Annotated[float, Field(ge=1.0)]
Theta = Annotated[float, Field(gt=1.0)]


class KeepRope(Section):
    """The model's own frequencies, whatever they are."""

    kind: Literal["keep"] = "keep"


class AbfRope(Section):
    """A raised base (adjusted base frequency). A scaling that the model already has stays."""

    kind: Literal["abf"] = "abf"
    theta: Theta
    """New base of the frequencies, for example 8e6 for 64K tokens."""


class LinearRope(Section):
    """Position interpolation: every frequency divided by `factor`."""

    kind: Literal["linear"] = "linear"
    factor: Factor | None = None
    """Context is stretched by this; taken as target over original context where absent."""


class NtkRope(Section):
    """Static NTK-aware scaling: the base times factor^(D/(D-2)); exported as a plain base."""

    kind: Literal["ntk"] = "ntk"
    factor: Factor | None = None
    """Context is stretched by this; taken as target over original context where absent."""


class DynamicRope(Section):
    """NTK-aware scaling that grows with the length at inference.

    Training uses the frequencies of a full-length sequence; shorter ones see others after the export, so
    `ntk` or `yarn` is the better choice for training.
    """

    kind: Literal["dynamic"] = "dynamic"
    factor: Factor | None = None
    """Scaling factor beyond the original context; 1 follows the length exactly. Taken as target over original
    context where absent."""


class YarnRope(Section):
    """YaRN: high frequencies kept, low ones interpolated, attention logits rescaled."""

    kind: Literal["yarn"] = "yarn"
    factor: Factor | None = None
    """Context is stretched by this; taken as target over original context where absent."""
    original_max_position_embeddings: PositiveInt | None = None
    """Context before stretching; the model's own where absent."""
    theta: Theta | None = None
    """Base of the frequencies, if it changes too."""
    attention_factor: PositiveFloat | None = None
    """Factor on cos and sin; 0.1 ln(factor) + 1 where absent."""
    beta_fast: PositiveFloat = 32.0
    """Dimensions with more rotations than this over the original context are kept."""
    beta_slow: PositiveFloat = 1.0
    """Dimensions with fewer rotations than this are interpolated fully."""
    mscale: PositiveFloat | None = None
    """Weight of ln(factor) in the numerator of the attention factor; only together with `mscale_all_dim`."""
    mscale_all_dim: PositiveFloat | None = None
    """Weight of ln(factor) in its denominator; only together with `mscale`."""
    truncate: bool = True
    """Round the borders of the ramp to whole dimensions."""

    @model_validator(mode="after")
    def _check(self) -> YarnRope:
        if self.beta_fast <= self.beta_slow:
            rule = f"must exceed rope.beta_slow={self.beta_slow}"
            raise ConfigError("rope.beta_fast", self.beta_fast, rule, "the paper uses 32 and 1")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ConfigError("rope.mscale", self.mscale, "must be given together with rope.mscale_all_dim")
        if self.mscale is not None and self.attention_factor is not None:
            raise ConfigError(
                "rope.attention_factor", self.attention_factor, "excludes rope.mscale", "give one"
            )
        return self


class LongRope(Section):
    """LongRoPE: one factor for each pair of dimensions, read from a file.

    Training uses the long factors. `transformers` uses the short ones for sequences within the original
    context.
    """

    kind: Literal["longrope"] = "longrope"
    factors: Path
    """JSON file with the lists `short_factor` and `long_factor`, each of head_dim / 2 numbers."""
    factor: Factor | None = None
    """Ratio of new to original context, for the attention factor; taken as target over original where absent.
    """
    original_max_position_embeddings: PositiveInt | None = None
    """Context before stretching; the model's own where absent."""
    attention_factor: PositiveFloat | None = None
    """Factor on cos and sin; sqrt(1 + ln factor / ln original) where absent."""


class Llama3Rope(Section):
    """Llama 3.1: low frequencies divided by `factor`, high ones kept, a smooth ramp between."""

    kind: Literal["llama3"] = "llama3"
    factor: Factor | None = None
    """Division of the low frequencies; taken as target over original context where absent."""
    original_max_position_embeddings: PositiveInt | None = None
    """Context before stretching; the model's own where absent."""
    low_freq_factor: PositiveFloat = 1.0
    """Wavelengths over original / this are divided by `factor`."""
    high_freq_factor: PositiveFloat = 4.0
    """Wavelengths under original / this are kept."""
    theta: Theta | None = None
    """Base of the frequencies, if it changes too."""

    @model_validator(mode="after")
    def _check(self) -> Llama3Rope:
        if self.high_freq_factor <= self.low_freq_factor:
            rule = f"must exceed rope.low_freq_factor={self.low_freq_factor}"
            raise ConfigError("rope.high_freq_factor", self.high_freq_factor, rule, "Llama 3.1 uses 4 and 1")
        return self


RopeConfig = Annotated[
    KeepRope | AbfRope | LinearRope | NtkRope | DynamicRope | YarnRope | LongRope | Llama3Rope,
    Field(discriminator="kind"),
]
