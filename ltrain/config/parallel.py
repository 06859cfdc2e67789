"""How the work is laid over devices: `parallel`, and what attention computes: `attention`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from ltrain.config.base import Section
from ltrain.config.patterns import DenseFields, PatternConfig
from ltrain.config.planner import AssignmentConfig, StaticAssignment
from ltrain.config.stage_links import IdentityLinks, StageLinksConfig


class ContextSection(Section):
    degree: PositiveInt = 1
    """Ranks that share one sequence. Under a planned assignment groups have sizes of their own: degree x data
    ranks are the pool that sequences are dealt to."""
    schedule: Literal[
        "auto",
        "ring",
        "hierarchical",
        "nested_ring",
        "all_gather",
        "ulysses",
        "ulysses_ring",
        "halo",
        "needed",
    ] = "auto"
    """How keys and values travel; `auto` asks the cost model and prints its choice and why."""
    layout: Literal["auto", "striped", "zigzag", "contiguous", "dealt"] = "auto"
    """Which rank holds which tokens. `dealt` deals blocks longest first by their predicted attention work;
    `auto` stripes, and deals where the busiest rank would have over 1.05 times the mean work.
    """
    block: PositiveInt = 128
    """Tokens of a block: the unit of the layout and of sparse patterns."""
    node_size: PositiveInt | None = None
    """Ranks of the group inside one node, for hierarchical schedules; taken from the launch where absent."""
    profile: Path | None = None
    """What `ltrain calibrate` measured on this kind of machine, for the `auto` schedule (default:
    built-in).
    """


class ParallelSection(Section):
    tensor: PositiveInt = 1
    """Tensor-parallel degree."""
    sequence_parallel: bool = True
    """Shard norms and residuals over the tensor-parallel ranks (without effect at degree 1)."""
    pipeline: PositiveInt = 1
    """Pipeline-parallel degree."""
    context: ContextSection = ContextSection()
    """Context parallelism."""
    stage_links: StageLinksConfig = IdentityLinks()
    """What crosses the boundaries of pipeline stages."""
    assignment: AssignmentConfig = StaticAssignment()
    """How each step's documents are assigned to ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward still runs."""


class AttentionSection(Section):
    pattern: PatternConfig = DenseFields()
    """Which keys a query attends; dense by default."""
