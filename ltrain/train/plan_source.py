"""Where the plans of a run's steps come from: one rank has them made ahead and sends them to the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ltrain.config.base import ConfigError
from ltrain.config.planner import PlannedAssignment
from ltrain.data.rows import Row
from ltrain.planner.ahead import PlanAhead
from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.cost import CostModel
from ltrain.planner.plan import Plan
from ltrain.planner.setup import plan_options, start_ahead
from ltrain.planner.solve import plan_batch


def from_main(make: Callable[[], Any]) -> Any:
    """What `make` returns on rank 0, on every rank; a ConfigError of it is raised on all. Collective."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except ConfigError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    if box[1] is not None:
        raise box[1]
    return box[0]


def lengths_of(rows: Sequence[Row]) -> list[int]:
    """Tokens of the rows' parts, in order: what is dealt."""
    return [part.num_tokens for row in rows for part in row.parts()]


class PlanSource:
    """Plans of the steps that the loader has read, equal on all ranks.

    Rank 0 holds the planning process. `upcoming` gives the rows of the steps that come next; each time a plan
    is taken they are submitted, so that they are planned while this step trains. `waited_s` is what the last
    `take` waited.
    """

    def __init__(
        self,
        section: PlannedAssignment,
        cluster: ClusterSpec,
        cost: CostModel,
        block: int,
        upcoming: Callable[[], list[list[Row]]],
    ) -> None:
        self._cluster, self._options = cluster, plan_options(section, block)
        self._cost = cost
        self._upcoming = upcoming
        self._queue: list[tuple[int, list[Row]]] = []
        self._next = 0
        self.waited_s = 0.0
        self._ahead: PlanAhead | None = None
        if dist.get_rank() == 0:
            self._ahead = start_ahead(section, cluster, cost, block)

    def set_cost(self, cost: CostModel) -> None:
        """Plan steps that are not submitted yet with another cost model."""
        self._cost = cost
        if self._ahead is not None:
            self._ahead.set_cost(cost)

    def take(self, rows: list[Row]) -> Plan:
        """The plan of a step's rows, which has been made already where the loader read them ahead.
        Collective."""
        began = time.perf_counter()
        text, solve_s = from_main(lambda: self._take(rows))
        plan = _read(text, solve_s)
        self.waited_s = time.perf_counter() - began
        return plan

    def now(self, rows: list[Row]) -> Plan:
        """A plan of rows that are no step's, made while all ranks wait. Collective."""

        def make() -> tuple[str, float]:
            options = {**self._options, "solver": "enumerate", "time_limit_s": None}
            plan = plan_batch(lengths_of(rows), self._cluster, self._cost, **options)
            return plan.to_json(), plan.solve_s

        return _read(*from_main(make))

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def _take(self, rows: list[Row]) -> tuple[str, float]:
        assert self._ahead is not None
        upcoming = self._upcoming()
        for key, queued in list(self._queue):
            if queued is not rows and not any(queued is step for step in upcoming):
                # A step that will not come: the run went back to a checkpoint.
                self._ahead.discard(key)
                self._queue.remove((key, queued))
        for step in (rows, *upcoming):
            if not any(queued is step for _, queued in self._queue):
                self._ahead.submit(self._next, lengths_of(step))
                self._queue.append((self._next, step))
                self._next += 1
        key = next(key for key, queued in self._queue if queued is rows)
        self._queue = [(k, queued) for k, queued in self._queue if k != key]
        plan = self._ahead.take(key)
        return plan.to_json(), plan.solve_s


def _read(text: str, solve_s: float) -> Plan:
    return replace(Plan.from_json(text), solve_s=solve_s)
