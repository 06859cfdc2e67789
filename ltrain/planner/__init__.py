"""Which devices work on which documents: cost model, solvers, plans. Nothing here imports torch."""

from ltrain.planner.cluster import ClusterSpec, Link, Node
from ltrain.planner.cost import CostModel, MemoryModel
from ltrain.planner.plan import Group, Plan
from ltrain.planner.solve import certify, plan_batch

__all__ = [
    "ClusterSpec",
    "CostModel",
    "Group",
    "Link",
    "MemoryModel",
    "Node",
    "Plan",
    "certify",
    "plan_batch",
]
