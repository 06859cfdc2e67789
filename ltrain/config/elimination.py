"""Which tokens a layer processes: `elimination`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from ltrain.config.base import ConfigError, Section

Ratio = Annotated[float, Field(gt=0, le=1)]


class NoElimination(Section):
    """Every layer processes every token."""

    kind: Literal["none"] = "none"


class PooledScorer(Section):
    """Causal softmax column mass of block-pooled queries and keys; nothing is trained."""

    kind: Literal["pooled"] = "pooled"
    pool: Literal["means", "tokens"] = "means"
    """Project each block's mean hidden state (a block's share of the projections' cost), or project every
    token and average queries and keys after rotation."""


class LemoScorer(Section):
    """Tile maximum of positive scores of all tokens before rotation, column sum (arXiv 2501.09767)."""

    kind: Literal["lemo"] = "lemo"
    causal: bool = False
    """Count only keys that the query can see; the published score counts all."""


class PredictorScorer(Section):
    """The learned low-rank predictor of the `lemo` score, from `ltrain fit-predictor`."""

    kind: Literal["predictor"] = "predictor"
    path: Path
    """Folder that `ltrain fit-predictor` wrote, for this run's model."""


class RandomScorer(Section):
    """Random blocks, another draw for each step, row and layer: a control."""

    kind: Literal["random"] = "random"


class RecencyScorer(Section):
    """The last blocks: a control."""

    kind: Literal["recency"] = "recency"


ScorerConfig = Annotated[
    PooledScorer | LemoScorer | PredictorScorer | RandomScorer | RecencyScorer, Field(discriminator="kind")
]


class BlockElimination(Section):
    """Layers process the informative blocks of tokens only, in training; evaluation is dense."""

    kind: Literal["blocks"] = "blocks"
    mode: Literal["qkv", "q", "layer", "backward"] = "qkv"
    """What dropped tokens skip in a layer: attention as queries, keys and values; attention as queries only;
    the whole layer; nothing in the forward pass, but the backward pass of attention (an approximation)."""
    ratio: Ratio | tuple[Ratio, ...] | str = 0.5
    """Share of the blocks that a layer keeps: one number for all layers, one a layer, or `file:PATH` of what
    `ltrain calibrate-elimination` wrote. 1 keeps a layer dense, bit for bit."""
    dense_layers: tuple[NonNegativeInt, ...] = ()
    """Layers, counted from 0 over the whole model, that stay dense where `ratio` is one number."""
    block: PositiveInt | None = None
    """Tokens of a block, a divisor of `parallel.context.block`; that block by default."""
    strata: PositiveInt = 8
    """Parts of the sequence that keep the same number of blocks each: a multiple of 2 x tensor x context
    degree. Equal strata give equal choices for every world size."""
    sink_blocks: NonNegativeInt = 1
    """First blocks of every document that are always kept."""
    local_blocks: NonNegativeInt = 1
    """Last blocks of every document that are always kept."""
    target_blocks: bool = False
    """Always keep blocks that hold targets: for data in which few tokens are targets."""
    anneal: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Last share of the steps over which the ratios rise linearly to 1."""
    scorer: ScorerConfig = PooledScorer()
    """How blocks are ranked."""

    @model_validator(mode="after")
    def _check(self) -> BlockElimination:
        if isinstance(self.ratio, str) and not self.ratio.startswith("file:"):
            raise ConfigError(
                "elimination.ratio", self.ratio, "must be a number, a list, or file:PATH", "0.5 keeps half"
            )
        if self.dense_layers and not isinstance(self.ratio, float | int):
            raise ConfigError(
                "elimination.dense_layers", self.dense_layers, "needs one ratio for all layers",
                "write 1 for these layers in the list",
            )  # fmt: skip
        if len(set(self.dense_layers)) != len(self.dense_layers):
            raise ConfigError("elimination.dense_layers", self.dense_layers, "must not name a layer twice")
        return self


EliminationConfig = Annotated[NoElimination | BlockElimination, Field(discriminator="kind")]
