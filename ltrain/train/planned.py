"""`planned` assignment: each step's documents are dealt to groups of different sizes (docs/planner.md)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ltrain.config.planner import MeasuredCost, PlannedAssignment
from ltrain.config.schema import RunConfig
from ltrain.data.rows import Row, Stream
from ltrain.metrics.sinks import JsonLines
from ltrain.model.spec import ModelSpec
from ltrain.parallel.collectives import subgroup
from ltrain.parallel.layout import SequenceLayout
from ltrain.parallel.mesh import Mesh
from ltrain.planner.calibrate import OnlineCalibration
from ltrain.planner.cost import CostModel
from ltrain.planner.groups import RankTask, all_groups, block_owners, rank_tasks, ranks_per_node
from ltrain.planner.plan import Plan
from ltrain.planner.probe import fit_cost, probe_cost, probe_plans
from ltrain.planner.setup import cluster_of
from ltrain.train.batch import MicroBatch, make_micro_batch
from ltrain.train.cost import base_cost, constants, with_constants
from ltrain.train.group_times import GroupTimes
from ltrain.train.plan_source import PlanSource, from_main

log = logging.getLogger("ltrain")


class Planned:
    """Deals the documents of each step over the pool of data x context ranks.

    A plan is made of parts of rows (documents, or rows where there is no document mask), never cut, so that
    every token has the label, position and visible keys that it has under a static assignment. Every rank
    gets as many micro-batches as the plan has; one that a micro-batch leaves idle runs a few tokens of
    padding. `upcoming` gives the rows of the next steps; `run` carries micro-batches out forward and backward
    and is what the cost model is measured with. Every step's groups go to `groups.jsonl` in `folder`, with
    predicted and measured seconds.
    """

    def __init__(
        self,
        config: RunConfig,
        section: PlannedAssignment,
        spec: ModelSpec,
        mesh: Mesh,
        *,
        upcoming: Callable[[], list[list[Row]]],
        longest: int,
        run: Callable[[list[MicroBatch]], None],
        folder: Path,
    ) -> None:
        parallel = config.parallel
        self.mesh, self.pool, self.block = mesh, mesh.data_context, parallel.context.block
        self.times = GroupTimes(mesh.device)
        self.last: Plan | None = None
        self.measured_s: tuple[tuple[float, ...], ...] = ()
        self._section, self._spec = section, spec
        self._cluster = cluster_of(section, self.pool.size)
        self._cost = base_cost(config, section, spec)
        self._known = not isinstance(section.cost, MeasuredCost)
        self._tensor = parallel.tensor
        # Sequence parallelism cuts every shard evenly over the tensor-parallel ranks.
        self._multiple = parallel.tensor if parallel.sequence_parallel else 1
        self._longest, self._run, self._upcoming = longest, run, upcoming
        self._source: PlanSource | None = None
        self._calibration: OnlineCalibration | None = None
        self._calibration_state: dict[str, Any] | None = None
        self._path = folder / "groups.jsonl"
        self._file: JsonLines | None = None
        self._held_out: tuple[list[int], Plan] | None = None

    @property
    def cost(self) -> CostModel:
        """The cost model that plans are made with from now on."""
        return self._calibration.cost if self._calibration else self._cost

    def start(self) -> None:
        """Measure the cost model where that is asked for and no checkpoint brought it, and start planning.
        Collective; done by the first plan otherwise."""
        if self._source is not None:
            return
        if not self._known:
            self._measure()
        if self._section.calibrate == "online":
            self._calibration = OnlineCalibration(self._cluster, self._cost)
            if self._calibration_state is not None:
                self._calibration.load_state_dict(self._calibration_state)
        self._source = PlanSource(self._section, self._cluster, self.cost, self.block, self._upcoming)

    def batches(self, rows: Sequence[Row]) -> list[MicroBatch]:
        """This rank's micro-batches of a step. Collective."""
        self.start()
        assert self._source is not None
        rows = rows if isinstance(rows, list) else list(rows)
        self.last = self._source.take(rows)
        return self.carry_out(self.last, rows)

    def evaluation(self, rows: Sequence[Row]) -> Iterator[list[MicroBatch]]:
        """Micro-batches of held-out rows, one at a time. Collective; rows are planned at their first use."""
        self.start()
        assert self._source is not None
        rows = list(rows)
        lengths = [part.num_tokens for row in rows for part in row.parts()]
        if self._held_out is None or self._held_out[0] != lengths:
            self._held_out = (lengths, self._source.now(rows))
        for batch in self._each(self._held_out[1], rows):
            yield [batch]

    def carry_out(self, plan: Plan, rows: Sequence[Row]) -> list[MicroBatch]:
        """This rank's micro-batches under a plan of the rows' parts. Raises ConfigError where the plan is of
        other lengths. Collective over the members of each group."""
        return list(self._each(plan, rows))

    def _each(self, plan: Plan, rows: Sequence[Row]) -> Iterator[MicroBatch]:
        parts = [part for row in rows for part in row.parts()]
        plan.validate([part.num_tokens for part in parts])
        me = self.pool.rank
        for ranks in all_groups([plan]):
            if me in ranks:
                self._group(ranks)
        for task in rank_tasks(plan, me, self.block):
            yield self._micro_batch(task, parts)

    def _micro_batch(self, task: RankTask, parts: Sequence[Row]) -> MicroBatch:
        ranks = task.group or (self.pool.rank,)
        mine = tuple(parts[s] for s in task.sequences)
        weights = task.weights or (1.0,)
        tokens = stream_tokens(task.num_tokens, weights, self.block, self._multiple)
        owners = block_owners(tokens, weights, self.block)
        even = len(set(weights)) == 1
        return make_micro_batch(
            Stream(mine, tokens),
            group=self._group(ranks),
            rank=task.member,
            size=len(ranks),
            device=self.mesh.device,
            node_size=ranks_per_node(self._cluster, ranks),
            layout=SequenceLayout("striped", tokens, len(ranks), self.block)
            if even
            else SequenceLayout.dealt(owners.tolist(), tokens, len(ranks), self.block),
            # One rank exchanges nothing: any schedule over tokens is plain attention.
            schedule="ring" if len(ranks) == 1 else task.schedule,
        )

    def _group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """The process group of these ranks of the pool, made once."""
        return subgroup(self.pool.group, "assignment", ranks)

    def after_step(self, step: int) -> dict[str, float]:
        """Metrics of the step that has ended, its record, and the correction of the cost model.
        Collective."""
        plan, source = self.last, self._source
        assert plan is not None and source is not None
        seconds, whole = self.times.collect()
        shape = (len(plan.micro_batches), self.pool.size)
        table = torch.zeros(1 + shape[0] * shape[1], dtype=torch.float64)
        table[0] = whole
        if seconds:
            table[1:].view(shape)[:, self.pool.rank] = torch.tensor(seconds, dtype=torch.float64)
        table = table.to(self.mesh.device)
        dist.all_reduce(table, dist.ReduceOp.MAX, group=self.pool.group)
        whole_s, by_rank = float(table[0]), table[1:].view(shape).cpu()
        if self.mesh.pipeline.size > 1:
            # Micro-batches overlap in a pipeline: there is no time of one.
            by_rank.zero_()
        self.measured_s = tuple(
            tuple(float(by_rank[m, list(group.ranks)].max()) for group in groups)
            for m, groups in enumerate(plan.micro_batches)
        )
        if dist.get_rank() == 0:
            self._record(step, plan, whole_s)
        if self._calibration is not None:
            self._calibration.observe(plan, self.measured_s)
            source.set_cost(self._calibration.cost)
        return {
            "time/plan_s": source.waited_s,
            "balance/lp_predicted_over_measured": self.predicted_s(plan) / whole_s if whole_s else 0.0,
            "balance/plan_gap": plan.gap,
            "balance/plan_micro_batches": float(shape[0]),
        }

    def _record(self, step: int, plan: Plan, whole_s: float) -> None:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = JsonLines(self._path, step - 1 or None)
            shapes = ", ".join("+".join(str(g.degree) for g in groups) for groups in plan.micro_batches)
            log.info(
                "first plan: groups %s; %.3g s predicted, %.3g s at least",
                shapes,
                plan.predicted_s,
                plan.lower_bound_s,
            )
        groups = [
            {
                "micro_batch": m,
                "ranks": group.ranks,
                "schedule": group.schedule,
                "documents": len(group.sequences),
                "tokens": group.num_tokens,
                "predicted_s": group.predicted_s,
                "measured_s": seconds or None,
            }
            for m, (members, times) in enumerate(zip(plan.micro_batches, self.measured_s, strict=True))
            for group, seconds in zip(members, times, strict=True)
        ]
        whole = {"predicted_s": self.predicted_s(plan), "measured_s": whole_s, "planned_in_s": plan.solve_s}
        self._file.append(step, {**whole, "notes": plan.notes, "groups": groups})

    def predicted_s(self, plan: Plan) -> float:
        """Seconds of forward and backward: a pipeline takes as many micro-batches longer as it has further
        stages."""
        stages, number = self.mesh.pipeline.size, len(plan.micro_batches)
        return plan.predicted_s * (number + stages - 1) / number

    def _measure(self) -> None:
        """Find the cost model's constants by running probes through the run's own model. Collective."""
        section = self._section
        assert isinstance(section.cost, MeasuredCost)
        longest = min(self._longest, section.cost.probe_tokens)
        plans = probe_plans(
            self._cluster, self._cost, longest=longest, degrees=section.degrees, block=self.block
        )
        best = [np.full(len(plan.micro_batches[0]), np.inf) for plan in plans]
        rng = np.random.default_rng(0)
        rows = {
            n: Row(rng.integers(0, self._spec.vocab_size, n, dtype=np.int32), (n,))
            for plan in plans
            for n in plan.lengths
        }
        # Once more than asked for: what is made at first use is no part of a step.
        for repeat in range(section.cost.repeats + 1):
            batches = [self.carry_out(plan, [rows[n] for n in plan.lengths])[0] for plan in plans]
            self._run(batches)
            seconds, _ = self.times.collect()
            for plan, times, least in zip(plans, seconds, best, strict=True):
                table = torch.zeros(self.pool.size, dtype=torch.float64)
                table[self.pool.rank] = times
                table = table.to(self.mesh.device)
                dist.all_reduce(table, dist.ReduceOp.MAX, group=self.pool.group)
                found = [float(table[list(group.ranks)].max()) for group in plan.micro_batches[0]]
                if repeat:
                    np.minimum(least, found, out=least)
        fitted = from_main(
            lambda: constants(fit_cost(self._cost, self._cluster, plans, [list(times) for times in best]))
        )
        self._cost = with_constants(probe_cost(self._cost), fitted)
        self._known = True
        if dist.get_rank() == 0:
            log.info("cost model, measured: %s", ", ".join(f"{k} {v:.3g}" for k, v in fitted.items()))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run plans with: the measured constants, and, on rank 0, the calibration."""
        return {
            "tensor": self._tensor,
            "constants": constants(self._cost) if self._known else None,
            "calibration": self._calibration.state_dict() if self._calibration else None,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on with a checkpoint's cost model, unless the configuration gives other constants or a device is
        another block of ranks."""
        if state is None or state["constants"] is None or state["tensor"] != self._tensor:
            return
        found = state["constants"]
        if isinstance(self._section.cost, MeasuredCost):
            self._cost, self._known = with_constants(probe_cost(self._cost), found), True
        if constants(self._cost) == found:
            self._calibration_state = state.get("calibration")
        if self._source is not None:
            # The run went back to a checkpoint; plans under way are of steps that will not come.
            if self._calibration is not None and self._calibration_state is not None:
                self._calibration.load_state_dict(self._calibration_state)
            self._source.set_cost(self.cost)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        if self._file is not None:
            self._file.close()


def stream_tokens(num_tokens: int, weights: Sequence[float], block: int, multiple: int) -> int:
    """Length to which a stream of `num_tokens` tokens is padded: a multiple of `multiple`, which divides
    `block`, that leaves no member without a token, as mcore's layers need it."""
    tokens = max(1, -(-num_tokens // multiple)) * multiple
    blocks = len(weights)
    while len(set(block_owners(blocks * block, weights, block).tolist())) < len(weights):
        blocks += 1
    return max(tokens, (blocks - 1) * block + multiple)
