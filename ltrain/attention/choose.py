"""`schedule="auto"`: the schedule that the cost model finds fastest, forward and backward, among those that
serve."""

from __future__ import annotations

import torch

from ltrain.attention.cost_model import Prediction, Setting, Shapes, needed_token_heads, predict
from ltrain.attention.profile import Profile
from ltrain.attention.schedules.base import Problem
from ltrain.attention.schedules.halo import halo_blocks
from ltrain.attention.work import Work, visible_entries
from ltrain.config.base import ConfigError


def candidates(problem: Problem, node_size: int | None) -> list[str]:
    """The schedules that can serve the problem, in order of preference at equal time."""
    ranks = problem.layout.world_size
    found = ["ring", "ulysses", "all_gather"]
    if node_size is not None and 1 < node_size < ranks and ranks % node_size == 0:
        found += ["hierarchical", "nested_ring", "ulysses_ring"]
    if not selects_few(problem):
        return found
    try:
        halo_blocks(problem)
    except ConfigError:
        return [*found, "needed"]
    return ["halo", *found, "needed"]


def selects_few(problem: Problem) -> bool:
    """Whether it can pay to move selected blocks only: not where most blocks are selected anyway."""
    return problem.index.density() < 0.5 or problem.window is not None or problem.doc_ids is not None


def setting_of(problem: Problem, profile: Profile) -> Setting:
    entries = visible_entries(problem.index, problem.layout, problem.num_q_heads, problem.doc_ids)
    item = torch.empty(0, dtype=problem.dtype).element_size()
    shapes = Shapes(
        problem.num_q_heads,
        problem.num_kv_heads,
        problem.head_dim,
        problem.value_dim,
        item,
        item,
        problem.batch,
    )
    return Setting(
        Work.of(entries, problem.layout, problem.num_q_heads),
        shapes,
        profile,
        needed_token_heads(entries, problem.layout, problem.num_kv_heads) if selects_few(problem) else None,
    )


def choose(
    problem: Problem, profile: Profile, node_size: int | None, memory_limit: float | None = None
) -> tuple[str, str]:
    """(name, why). Schedules that need over `memory_limit` bytes beside inputs and outputs are left out.

    Deterministic in its arguments, so that ranks which share them agree without a message.
    """
    if problem.layout.world_size == 1:
        return "ring", "one rank: nothing to exchange"
    setting = setting_of(problem, profile)
    found = [predict(name, setting) for name in candidates(problem, node_size)]
    fitting = [p for p in found if memory_limit is None or p.memory_bytes <= memory_limit]
    best = min(fitting or found, key=lambda p: p.total_s if fitting else p.memory_bytes)
    return best.schedule, explain(best, found, setting, memory_limit)


def explain(best: Prediction, found: list[Prediction], setting: Setting, memory_limit: float | None) -> str:
    """One paragraph: the choice, its cost, the runners-up and the balance of work."""
    others = sorted((p for p in found if p is not best), key=lambda p: p.total_s)
    lines = [
        f"{best.schedule} for {setting.ranks} ranks: predicted {best.forward_s * 1e3:.2f} ms forward, "
        f"{best.backward_s * 1e3:.2f} ms backward a layer "
        f"(profile {setting.profile.name}: {setting.profile.source})",
        f"work of the busiest rank {setting.work.imbalance:.3f} x mean",
    ]
    for other in others[:2]:
        cause = f"{other.total_s / best.total_s:.2f} x the time"
        if memory_limit is not None and other.memory_bytes > memory_limit:
            cause = f"{other.memory_bytes / 2**30:.1f} GiB of buffers"
        lines.append(f"{other.schedule}: {cause}")
    return "; ".join(lines)
