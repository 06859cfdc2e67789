"""The planner's inputs from the configuration section."""

from __future__ import annotations

from typing import Any

from ltrain.config.base import ConfigError
from ltrain.config.planner import ClusterFile, GivenCost, PlannedAssignment
from ltrain.planner.ahead import PlanAhead
from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.cost import CostModel, MemoryModel
from ltrain.planner.kinds import group_kinds
from ltrain.planner.work import DenseWork, Work


def cluster_of(section: PlannedAssignment, num_devices: int) -> ClusterSpec:
    """The cluster that a run's shards are on. Raises ConfigError where a profile is wrong or of another
    size."""
    given = section.cluster
    if isinstance(given, ClusterFile):
        cluster = ClusterSpec.from_file(given.path)
        cluster.check_world(num_devices)
        return cluster
    return ClusterSpec.uniform(
        num_devices,
        given.devices_per_node or num_devices,
        given.intra_gb_s,
        given.inter_gb_s,
        given.tokens_per_device,
        latency_s=given.latency_s,
    )


def cost_model(
    section: PlannedAssignment,
    *,
    work: Work | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
) -> CostModel:
    """The cost model of a section with given constants, with the attention pattern's work and the model's
    heads."""
    cost = section.cost
    assert isinstance(cost, GivenCost)
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
        num_exchanges=cost.num_exchanges,
    )


def plan_options(section: PlannedAssignment, block: int) -> dict[str, Any]:
    """Keyword arguments of `plan_batch`."""
    return {
        "solver": section.solver,
        "time_limit_s": section.time_limit_s,
        "degrees": section.degrees,
        "block": block,
    }


def start_ahead(section: PlannedAssignment, cluster: ClusterSpec, cost: CostModel, block: int) -> PlanAhead:
    """The planning process of a run."""
    return PlanAhead(cluster, cost, timeout_s=section.timeout_s, **plan_options(section, block))


def check_longest(
    field: str, length: int, section: PlannedAssignment, cluster: ClusterSpec, cost: CostModel, block: int
) -> None:
    """Raise ConfigError, naming the memory that is missing and the longest that would fit, where a sequence
    of `length` tokens fits no group."""
    kinds = group_kinds(cluster, cost.tokens_by_island(cluster), section.degrees, block)
    kinds = [kind for kind in kinds if cost.schedules_for(kind)]
    room = max((kind.capacity for kind in kinds), default=0)
    if length <= room:
        return
    need = f"{length} tokens of activations"
    if cost.memory is not None:
        need = f"{length * cost.memory.bytes_per_token[cost.memory.level] / 2**30:.1f} GiB of activations"
    raise ConfigError(
        field,
        length,
        f"needs {need}, more than any group of the {cluster.num_devices} devices holds; the longest sequence "
        f"that fits has {room} tokens",
        "set data.max_document_tokens or train.seq_len to it, add devices, or keep less for the backward",
    )
