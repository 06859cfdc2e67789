"""Which keys a query attends: one section a pattern, chosen by `attention.pattern.kind`.

Token counts are rounded up to whole blocks of `parallel.context.block` tokens, so a pattern keeps at least
what its fields say. What each one computes stands beside its class in `ltrain/attention/patterns/kinds`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from ltrain.config.base import ConfigError, Section

HeadAxis = Literal["kv", "query"]
Fraction = Annotated[float, Field(gt=0, le=1)]


class PatternFields(Section):
    """What every pattern has."""

    dense_layers: tuple[NonNegativeInt, ...] = ()
    """Layers, counted from 0 over the whole model, that attend to every earlier token instead."""

    @model_validator(mode="after")
    def _distinct(self) -> PatternFields:
        if len(set(self.dense_layers)) != len(self.dense_layers):
            raise ConfigError(
                "dense_layers", self.dense_layers, "must not name a layer twice", "drop repeats"
            )
        return self


class DenseFields(PatternFields):
    """Every earlier token of the document."""

    kind: Literal["dense"] = "dense"


class SlidingWindowFields(PatternFields):
    """The nearest tokens, and the first tokens of the document (arXiv 2309.17453)."""

    kind: Literal["sliding_window"] = "sliding_window"
    window: PositiveInt = 4096
    """Tokens, counting the query's own, that a query sees at least."""
    sinks: NonNegativeInt = 0
    """First tokens of every document that all its queries see."""


class S2Fields(PatternFields):
    """Local blocks and, for each key/value head, another strided shard of the context (arXiv 2407.17678)."""

    kind: Literal["s2"] = "s2"
    local_blocks: PositiveInt = 16
    """Nearest blocks that every head sees, the diagonal counted."""
    stride: PositiveInt = 8
    """Every `stride`-th block is seen by a head wherever the query stands."""
    head_step: PositiveInt | None = None
    """Residues between neighbouring heads; by default stride // number of key/value heads, at least 1."""
    head_offset: NonNegativeInt = 0
    """Added to every head's residue."""
    dense_heads: NonNegativeInt = 0
    """The last heads of the model that see everything."""


class LongGenFields(PatternFields):
    """Full attention in some layers, one cheap pattern in the others (arXiv 2410.01485)."""

    kind: Literal["longgen"] = "longgen"
    full_layers: Literal["middle_third"] | tuple[NonNegativeInt, ...] = "middle_third"
    """Layers with full attention."""
    sparse: Annotated[SlidingWindowFields | S2Fields, Field(discriminator="kind")] = SlidingWindowFields(
        window=2048, sinks=64
    )
    """What the other layers attend."""


class VerticalSlashFields(PatternFields):
    """Per head: block diagonals and single keys, found from a window of queries (arXiv 2510.18830,
    2407.02490).
    """

    kind: Literal["vertical_slash"] = "vertical_slash"
    observed: Annotated[int, Field(ge=8)] = 64
    """Queries of an observation window."""
    anchors: PositiveInt = 1
    """Observation windows of a document, at the ends of equal parts of it."""
    vertical_p: Fraction = 0.9
    """Share of the observed attention that window, sinks and verticals reach together."""
    slash_p: Fraction = 0.9
    """Share of the observed attention that window, sinks, heavy verticals and slashes reach together."""
    max_verticals: PositiveInt = 1024
    """Most verticals of a head and document, sinks aside."""
    max_slashes: PositiveInt = 64
    """Most slashes of a head and document; each is a block of distances wide and costs up to two block
    diagonals.
    """
    window: PositiveInt = 256
    """Nearest tokens that are always kept."""
    sinks: NonNegativeInt = 16
    """First tokens of every document that are always kept."""
    dense_below: NonNegativeInt = 1024
    """Documents of up to this many tokens are attended in full, without a search."""
    heads: HeadAxis = "kv"
    """One choice for each key/value head, or for each query head."""
    verticals: Literal["blocks", "tokens"] = "blocks"
    """Round verticals up to whole blocks, or attend exactly these keys by a second call on gathered rows."""


class XAttentionFields(PatternFields):
    """Blocks by the attention along antidiagonals of strided tiles (arXiv 2503.16428)."""

    kind: Literal["xattention"] = "xattention"
    stride: PositiveInt = 16
    """Side of the tiles whose antidiagonal is summed: a power of two that divides the block."""
    pool: PositiveInt = 4
    """Neighbouring tokens averaged before the antidiagonal is taken: 1 is the published score, more is
    cheaper and sends that much less of the keys between ranks.
    """
    threshold: Fraction = 0.9
    """Share of every row's estimated attention that the chosen blocks reach."""
    heads: HeadAxis = "kv"
    """One choice for each key/value head, or for each query head."""

    @model_validator(mode="after")
    def _check(self) -> XAttentionFields:
        if self.stride & (self.stride - 1):
            raise ConfigError("stride", self.stride, "must be a power of two", "use 8, 16 or 32")
        if self.stride % self.pool:
            raise ConfigError("pool", self.pool, f"must divide stride={self.stride}")
        return self


class BlockTopKFields(PatternFields):
    """The blocks whose mean key agrees most with the block of queries (MoBA, arXiv 2502.13189)."""

    kind: Literal["block_topk"] = "block_topk"
    top_k: PositiveInt = 16
    """Blocks a row keeps, the diagonal and the sink counted."""
    sink_blocks: NonNegativeInt = 1
    """First blocks of every document that are always kept."""
    heads: HeadAxis = "kv"
    """One choice for each key/value head, or for each query head."""


class SeerGateFields(PatternFields):
    """Blocks by a small gate that learns the block-pooled attention map (arXiv 2410.13276)."""

    kind: Literal["seer_gate"] = "seer_gate"
    top_k: PositiveInt = 16
    """Blocks a row keeps, the diagonal and the sink counted."""
    sink_blocks: NonNegativeInt = 1
    """First blocks of every document that are always kept."""
    gate_dim: PositiveInt = 64
    """Size of the gate's query and key vectors."""
    loss_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the distillation loss (it trains the gate only)."""
    target_rows: PositiveInt = 8
    """Blocks of queries whose true attention map is computed for the loss, each step and layer."""


class NsaFields(PatternFields):
    """Compressed, selected and window branches, gated (arXiv 2502.11089)."""

    kind: Literal["nsa"] = "nsa"
    compress: PositiveInt = 32
    """Tokens that one compressed key stands for: a divisor of the block."""
    top_k: PositiveInt = 16
    """Blocks a row selects, sink and nearest counted."""
    sink_blocks: NonNegativeInt = 1
    """First blocks of every document that are always selected."""
    local_blocks: PositiveInt = 2
    """Nearest blocks, the diagonal counted, that are always selected."""
    window: PositiveInt = 512
    """Tokens of the window branch."""
    initial_gates: tuple[float, float, float] = (0.0, 1.0, 0.0)
    """Gates of the compressed, selected and window branches before any training."""


PatternConfig = Annotated[
    DenseFields
    | SlidingWindowFields
    | S2Fields
    | LongGenFields
    | VerticalSlashFields
    | XAttentionFields
    | BlockTopKFields
    | SeerGateFields
    | NsaFields,
    Field(discriminator="kind"),
]
