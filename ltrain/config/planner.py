"""How documents are assigned to ranks: `parallel.assignment`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from ltrain.config.base import ConfigError, Section


class StaticAssignment(Section):
    kind: Literal["static"] = "static"
    """Every sequence is shared by the same number of ranks, `parallel.context.degree`."""


class CostSection(Section):
    """Constants of the planner's cost model; `ltrain calibrate` measures them."""

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
    overlap: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of attention's time behind which a ring's transfer can hide."""
    memory_bytes_per_token: dict[str, PositiveFloat] | None = None
    """Activation bytes per token by memory level; needed where the cluster gives memory in GiB."""
    memory_level: str | None = None
    """The memory level in use, a key of `memory_bytes_per_token`."""
    state_bytes: NonNegativeFloat = 0.0
    """Bytes of parameters, gradients and optimizer states on a device."""

    @model_validator(mode="after")
    def _level_is_known(self) -> CostSection:
        levels = self.memory_bytes_per_token
        if (levels is None) != (self.memory_level is None):
            raise ConfigError(
                "cost.memory_level", self.memory_level, "and memory_bytes_per_token go together"
            )
        if levels is not None and self.memory_level not in levels:
            raise ConfigError("cost.memory_level", self.memory_level, f"must be one of {', '.join(levels)}")
        return self


class PlannedAssignment(Section):
    kind: Literal["planned"]
    """Each step's sequences are dealt to groups of different sizes by the planner."""
    cluster: str
    """Profile of the devices and links: a YAML or JSON file."""
    cost: CostSection
    """Constants of the cost model."""
    solver: Literal["auto", "enumerate", "milp", "lp"] = "auto"
    """How plans are found; `auto` walks partitions, then runs the integer program while `time_limit_s`
    lasts."""
    time_limit_s: PositiveFloat | None = None
    """Seconds for the integer program per step; none are spent on it where absent."""
    degrees: Literal["powers_of_two", "any"] | tuple[PositiveInt, ...] = "powers_of_two"
    """Group sizes that a plan may use."""
    schedules: tuple[Literal["ulysses", "ring", "ulysses_ring"], ...] = ("ulysses", "ring", "ulysses_ring")
    """Exchanges that a group may choose from."""
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


AssignmentSection = Annotated[StaticAssignment | PlannedAssignment, Field(discriminator="kind")]
