"""From lengths to a plan: choose the number of micro-batches, solve each, put ranks to groups."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.planner.aggregate import aggregated_bound, aggregated_partitions
from ltrain.planner.bounds import area_bound
from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.cost import CostModel
from ltrain.planner.divide import divide
from ltrain.planner.enumerate import Solved, best_of, solve_by_enumeration
from ltrain.planner.kinds import place
from ltrain.planner.milp import EXACT_SEQUENCES, solve_by_program
from ltrain.planner.plan import Group, Plan
from ltrain.planner.problem import Assignment, BatchTable, Problem

Solver = Literal["auto", "enumerate", "milp", "lp"]
SOLVERS = ("auto", "enumerate", "milp", "lp")
# Micro-batch counts compared, from the least that fits memory.
TRIALS = 5
_MILP_LIMIT_S = 10.0


def plan_batch(
    lengths: Sequence[int],
    cluster: ClusterSpec,
    cost: CostModel,
    *,
    solver: Solver = "auto",
    time_limit_s: float | None = None,
    degrees: str | Sequence[int] = "powers_of_two",
    block: int = 1,
    trials: int = TRIALS,
) -> Plan:
    """Deal sequences of `lengths` tokens to micro-batches and groups of devices, with the least predicted
    step time.

    - `solver`: "enumerate" walks the partitions of the devices; "milp" solves the integer program from that
      plan as a warm start; "lp" plans from the relaxed program's group counts, and certifies with it; "auto"
      is "enumerate", then "milp" while `time_limit_s` lasts (None: no time is spent on it).
    - `degrees`: "powers_of_two", "any", or a list. `block`: shards are whole blocks of so many tokens.
      `trials`: micro-batch counts compared.

    Equal input gives an equal plan, except for "milp" and "auto" with a time limit. Raises ConfigError where
    a length is not positive or fits no group.
    """
    if solver not in SOLVERS:
        raise ConfigError("solver", solver, f"must be one of {', '.join(SOLVERS)}")
    if time_limit_s is not None and not time_limit_s > 0:
        raise ConfigError("time_limit_s", time_limit_s, "must be positive")
    if trials < 1:
        raise ConfigError("trials", trials, "must be at least 1")
    began = time.perf_counter()
    table = BatchTable(lengths, cluster, cost, degrees, block)
    runs, solved = _best_division(table, trials, "lp" if solver == "lp" else "enumerate")
    notes: list[str] = []
    if solver == "milp" or (solver == "auto" and time_limit_s is not None):
        limit = _MILP_LIMIT_S * len(runs) if time_limit_s is None else time_limit_s
        limit -= time.perf_counter() - began
        solved = _polish(table, runs, solved, limit, notes)
    plan = build_plan(table, runs, solved, solver, notes)
    return replace(plan, solve_s=time.perf_counter() - began)


def certify(
    plan: Plan,
    cluster: ClusterSpec,
    cost: CostModel,
    *,
    degrees: str | Sequence[int] = "powers_of_two",
    block: int = 1,
    exact_limit_s: float = 0.0,
) -> Plan:
    """The plan with its lower bound raised as far as the aggregated program proves; seconds, not
    milliseconds.

    Micro-batches of few sequences are also given to the integer program for `exact_limit_s` seconds each: its
    bound is proven too.
    """
    table = BatchTable(plan.lengths, cluster, cost, degrees, block)
    where = {int(sequence): position for position, sequence in enumerate(table.order)}
    total = 0.0
    for groups in plan.micro_batches:
        rows = np.array(sorted(where[s] for group in groups for s in group.sequences), dtype=np.int64)
        problem = table.problem(0, 0, rows)
        bound = aggregated_bound(problem, area_bound(problem))
        makespan = max(group.predicted_s for group in groups)
        if exact_limit_s > 0 and makespan > bound * 1.005 and len(rows) <= EXACT_SEQUENCES:
            bound = max(bound, solve_by_program(problem, cluster, None, exact_limit_s).lower_bound_s)
        total += min(bound, makespan)
    return replace(plan, lower_bound_s=max(plan.lower_bound_s, total))


def step_bound(table: BatchTable, micro_batches: int) -> float:
    """Seconds that no plan of the batch can beat, however it is divided: area over all devices, and a fixed
    time each."""
    whole = table.problem(0, len(table.lengths))
    prices = np.ones(len(whole.sizes))
    if len(whole.sizes) > 1:
        prices = np.array([island.node.speed for island in table.cluster.islands])
    area = np.where(whole.fits, whole.low * (whole.use @ prices)[None, :], np.inf).min(axis=1).sum()
    return float(area / (whole.sizes @ prices) + micro_batches * whole.low_fixed.min())


def _best_division(table: BatchTable, trials: int, solver: str) -> tuple[list[tuple[int, int]], list[Solved]]:
    """Runs of sorted sequences and their solutions, over micro-batch counts from the least that fits
    memory."""
    least = max(1, -(-int(table.lengths.sum()) // table.cluster_tokens))
    best: tuple[list[tuple[int, int]], list[Solved]] | None = None
    best_s, tried, parts = np.inf, 0, least
    while parts <= len(table.lengths) and (tried < trials or best is None):
        runs = divide(table.lengths, parts)
        if len(runs) == parts or best is None:
            solved = _solve_runs(table, runs, best_s, solver)
            if solved is not None:
                total = sum(one.makespan for one in solved)
                if total < best_s:
                    best, best_s = (runs, solved), total
            tried += best is not None
        parts += 1
    assert best is not None, "every sequence fits alone"
    return best


def _solve_runs(
    table: BatchTable, runs: list[tuple[int, int]], best_s: float, solver: str
) -> list[Solved] | None:
    """Solutions of all runs, or None once they can't total less than `best_s` or one has none."""
    problems = [table.problem(*run) for run in runs]
    left = [area_bound(problem) for problem in problems]
    if sum(left) >= best_s:
        return None
    solved: list[Solved] = []
    for index, problem in enumerate(problems):
        rest = best_s - sum(one.makespan for one in solved) - sum(left[index + 1 :])
        one = (
            solve_by_enumeration(problem, table.cluster, rest)
            if solver == "enumerate"
            else _solve_lp(problem, table.cluster)
        )
        if one.assignment is None or one.makespan >= rest:
            return None
        solved.append(one)
    return solved


def _solve_lp(problem: Problem, cluster: ClusterSpec) -> Solved:
    bound, ranked = aggregated_partitions(problem, area_bound(problem))
    placed = [row for row in ranked if place(cluster, problem.kinds, row) is not None][:48]
    found = best_of(problem, np.array(placed, dtype=np.int64), bound) if placed else None
    return Solved(found, bound)


def _polish(
    table: BatchTable, runs: list[tuple[int, int]], solved: list[Solved], limit_s: float, notes: list[str]
) -> list[Solved]:
    """The integer program on each micro-batch, the widest gap first, while time is left."""
    made = list(solved)
    order = sorted(range(len(runs)), key=lambda i: (made[i].lower_bound_s - made[i].makespan, i))
    end = time.perf_counter() + limit_s
    for place_, index in enumerate(order):
        left = end - time.perf_counter()
        if made[index].makespan <= made[index].lower_bound_s * (1 + 1e-4):
            continue
        if left < 0.05:
            notes.append(
                f"micro_batch {index}: no time left for the integer program, the enumerated plan stands"
            )
            continue
        share = left / (len(order) - place_)
        result = solve_by_program(table.problem(*runs[index]), table.cluster, made[index].assignment, share)
        if result.status in ("none", "infeasible"):
            notes.append(
                f"micro_batch {index}: the integer program found nothing in {share:.1f} s, "
                "the enumerated plan stands"
            )
        made[index] = Solved(result.assignment, max(made[index].lower_bound_s, result.lower_bound_s))
    return made


def build_plan(
    table: BatchTable,
    runs: list[tuple[int, int]],
    solved: list[Solved],
    solver: str,
    notes: Sequence[str] = (),
) -> Plan:
    """A Plan from solved micro-batches: ranks placed, each group's schedule chosen for what it holds."""
    micro_batches: list[tuple[Group, ...]] = []
    predicted = bound = 0.0
    for (start, stop), one in zip(runs, solved, strict=True):
        assert one.assignment is not None
        problem = table.problem(start, stop)
        groups = _groups(table, problem, np.arange(start, stop), one.assignment)
        makespan = max(group.predicted_s for group in groups)
        predicted += makespan
        bound += min(one.lower_bound_s, makespan)
        micro_batches.append(groups)
    lengths = np.empty(len(table.lengths), dtype=np.int64)
    lengths[table.order] = table.lengths
    least = max(1, -(-int(lengths.sum()) // table.cluster_tokens))
    return Plan(
        tuple(micro_batches),
        predicted,
        bound,
        min(step_bound(table, least), bound),
        tuple(int(length) for length in lengths),
        table.cluster.num_devices,
        solver,
        tuple(notes),
    )


def _groups(table: BatchTable, problem: Problem, rows: np.ndarray, made: Assignment) -> tuple[Group, ...]:
    used = sorted(set(made.group_of.tolist()))
    counts = np.bincount(made.kind_of[used], minlength=len(problem.kinds))
    placed = place(table.cluster, problem.kinds, [int(count) for count in counts])
    assert placed is not None, "a subset of placed groups can be placed"
    groups = []
    for g in used:
        k = int(made.kind_of[g])
        kind = problem.kinds[k]
        ranks = placed[k].pop(0)
        members = rows[made.group_of == g]
        schedule, seconds = table.best_schedule(kind, members)
        groups.append(
            Group(
                ranks,
                tuple(int(i) for i in table.order[members]),
                seconds,
                schedule,
                int(table.lengths[members].sum()),
                kind.capacity,
                _weights(table.cluster, kind.weights, ranks),
            )
        )
    return tuple(sorted(groups, key=lambda group: group.ranks))


def _weights(cluster: ClusterSpec, by_island: Sequence[float], ranks: Sequence[int]) -> tuple[float, ...]:
    islands = cluster.islands
    return tuple(
        next(
            weight
            for island, weight in zip(islands, by_island, strict=True)
            if island.first_rank <= rank < island.first_rank + island.size
        )
        for rank in ranks
    )
