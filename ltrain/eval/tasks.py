"""The tasks by name, and the groups that stand for several."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ltrain.config.base import ConfigError
from ltrain.eval import aggregation, questions, retrieval, shared, tracking
from ltrain.eval.harness import PREFIX
from ltrain.eval.sample import Task

RULER = (*retrieval.TASKS, *tracking.TASKS, *aggregation.TASKS, *questions.TASKS)
TASKS = {task.name: task for task in (*RULER, *shared.TASKS)}
GROUPS = {
    "ruler": tuple(task.name for task in RULER),
    "shared": tuple(task.name for task in shared.TASKS),
}
NEEDLE, PERPLEXITY = "needle", "perplexity"


@dataclass(frozen=True)
class Selection:
    """What to evaluate: tasks of ours, the needle heat map, perplexity, tasks of lm-eval."""

    tasks: tuple[Task, ...]
    needle: bool
    perplexity: bool
    harness: tuple[str, ...]


def select(names: Sequence[str]) -> Selection:
    """The tasks that names, groups and `lm_eval:TASK` stand for. Raises ConfigError on an unknown one."""
    chosen: dict[str, None] = {}
    for name in names:
        chosen |= dict.fromkeys(GROUPS.get(name, (name,)))
    harness = tuple(name.removeprefix(PREFIX) for name in chosen if name.startswith(PREFIX))
    rest = [name for name in chosen if not name.startswith(PREFIX)]
    known = [NEEDLE, PERPLEXITY, *GROUPS, *TASKS]
    for name in rest:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            fix = f"perhaps you meant {near[0]}" if near else f"known: {', '.join(known)}, {PREFIX}TASK"
            raise ConfigError("--tasks", name, "is no task", fix)
    return Selection(
        tuple(TASKS[name] for name in rest if name in TASKS),
        NEEDLE in rest,
        PERPLEXITY in rest,
        harness,
    )


def needle_task(depth: float) -> Task:
    """One needle at a depth of the haystack, 0 to 1. Samples differ by depth."""
    return Task(f"needle_{100 * depth:g}", retrieval.Needles("filler", depth=depth))
