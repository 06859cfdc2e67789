"""The planner's inputs from the configuration section."""

from __future__ import annotations

from typing import Any

from ltrain.config.planner import PlannedAssignment
from ltrain.planner.ahead import PlanAhead
from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.cost import CostModel, MemoryModel
from ltrain.planner.work import DenseWork, Work


def cost_model(
    section: PlannedAssignment,
    *,
    work: Work | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
) -> CostModel:
    """The cost model of a section, with the attention pattern's work and the model's heads."""
    cost = section.cost
    memory = None
    if cost.memory_bytes_per_token is not None and cost.memory_level is not None:
        memory = MemoryModel(cost.memory_bytes_per_token, cost.memory_level, cost.state_bytes)
    return CostModel(
        cost.attention_s,
        cost.linear_s,
        cost.fixed_s,
        cost.bytes_per_token,
        work=work or DenseWork(),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        schedules=section.schedules,
        overlap=cost.overlap,
        memory=memory,
    )


def plan_options(section: PlannedAssignment, block: int) -> dict[str, Any]:
    """Keyword arguments of `plan_batch`."""
    return {
        "solver": section.solver,
        "time_limit_s": section.time_limit_s,
        "degrees": section.degrees,
        "block": block,
    }


def start_ahead(section: PlannedAssignment, cost: CostModel, world_size: int, block: int) -> PlanAhead:
    """The planning process of a run. Raises ConfigError where the profile is wrong or of another machine."""
    cluster = ClusterSpec.from_file(section.cluster)
    cluster.check_world(world_size)
    return PlanAhead(cluster, cost, timeout_s=section.timeout_s, **plan_options(section, block))
