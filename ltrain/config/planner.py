"""How documents are assigned to ranks: `parallel.assignment`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from ltrain.config.base import ConfigError, Section


class StaticAssignment(Section):
    """Every row is shared by the same number of ranks, `parallel.context.degree`."""

    kind: Literal["static"] = "static"


class ClusterFile(Section):
    """Devices and links from a profile: for unequal devices, unequal links or measured rates."""

    kind: Literal["file"] = "file"
    path: str
    """The profile: a YAML or JSON file (docs/planner.md). A device is whatever runs one shard of a
    sequence."""


class UniformCluster(Section):
    """Equal devices on equal links, as many as the run has shards (data x context ranks)."""

    kind: Literal["uniform"] = "uniform"
    tokens_per_device: PositiveInt
    """Tokens of activations that one device holds."""
    devices_per_node: PositiveInt | None = None
    """Shards of one node; all of them where absent."""
    intra_gb_s: PositiveFloat = 100.0
    """10^9 bytes a second and device inside a node, one direction."""
    inter_gb_s: PositiveFloat = 12.5
    """The same between nodes."""
    latency_s: NonNegativeFloat = 1e-5
    """Seconds of one message."""


class MeasuredCost(Section):
    """Constants measured before the first step, on the run's own model and devices, and kept in its
    checkpoints. Not for pipelines, where the time of one micro-batch can't be told from the next one's.
    """

    kind: Literal["measured"] = "measured"
    probe_tokens: PositiveInt = 16384
    """Tokens of the longest probe, where documents are so long and a device holds them."""
    repeats: PositiveInt = 3
    """Times that every probe is run; the fastest counts."""


class GivenCost(Section):
    """Constants of this file."""

    kind: Literal["given"] = "given"
    attention_s: NonNegativeFloat
    """Seconds per token squared of dense causal attention on one device of speed 1, both passes, all
    layers."""
    linear_s: PositiveFloat
    """Seconds per token of everything else."""
    fixed_s: NonNegativeFloat = 0.0
    """Seconds per micro-batch whatever it holds."""
    bytes_per_token: NonNegativeFloat
    """Bytes that all-to-all moves per token in a step: 16 x layers x hidden size in bf16 without grouped
    heads."""
    num_exchanges: NonNegativeFloat = 0.0
    """Messages in sequence per ring step and micro-batch, each of which takes a link's latency."""
    overlap: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of attention's time behind which a ring's transfer can hide."""
    memory_bytes_per_token: dict[str, PositiveFloat] | None = None
    """Activation bytes per token by memory level; needed where the cluster gives memory in GiB."""
    memory_level: str | None = None
    """The memory level in use, a key of `memory_bytes_per_token`."""
    state_bytes: NonNegativeFloat = 0.0
    """Bytes of parameters, gradients and optimizer states on a device."""

    @model_validator(mode="after")
    def _level_is_known(self) -> GivenCost:
        levels = self.memory_bytes_per_token
        if (levels is None) != (self.memory_level is None):
            raise ConfigError(
                "cost.memory_level", self.memory_level, "and memory_bytes_per_token go together"
            )
        if levels is not None and self.memory_level not in levels:
            raise ConfigError("cost.memory_level", self.memory_level, f"must be one of {', '.join(levels)}")
        return self


ClusterConfig = Annotated[ClusterFile | UniformCluster, Field(discriminator="kind")]
CostConfig = Annotated[MeasuredCost | GivenCost, Field(discriminator="kind")]


class PlannedAssignment(Section):
    """Each step's documents are dealt to groups of different sizes by the planner (docs/planner.md)."""

    kind: Literal["planned"] = "planned"
    cluster: ClusterConfig
    """The devices and links that sequences are dealt to."""
    cost: CostConfig = MeasuredCost()
    """Constants of the cost model."""
    solver: Literal["auto", "enumerate", "milp", "lp"] = "auto"
    """How plans are found; `auto` walks partitions, then runs the integer program while `time_limit_s`
    lasts."""
    time_limit_s: PositiveFloat | None = None
    """Seconds for the integer program per step; none are spent on it where absent."""
    degrees: Literal["powers_of_two", "any"] | tuple[PositiveInt, ...] = "powers_of_two"
    """Group sizes that a plan may use."""
    schedules: tuple[Literal["ulysses", "ring", "ulysses_ring"], ...] = ("ulysses", "ring", "ulysses_ring")
    """Exchanges that a group may choose from; `parallel.context.schedule` has no say."""
    ahead: PositiveInt = 2
    """Steps that are planned in advance, in another process."""
    timeout_s: PositiveFloat = 30.0
    """Seconds that a step waits for its plan before the greedy plan takes its place."""
    calibrate: Literal["off", "online"] = "off"
    """`online` corrects the cost model from the measured times of the groups."""

    @model_validator(mode="after")
    def _lists_are_not_empty(self) -> PlannedAssignment:
        if not self.schedules:
            raise ConfigError(
                "parallel.assignment.schedules", self.schedules, "must name at least one schedule"
            )
        if self.degrees == ():
            raise ConfigError("parallel.assignment.degrees", self.degrees, "must name at least one degree")
        return self


AssignmentConfig = Annotated[StaticAssignment | PlannedAssignment, Field(discriminator="kind")]
