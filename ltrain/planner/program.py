"""Solving a PuLP model with HiGHS, or CBC where HiGHS is absent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pulp

Status = Literal["optimal", "feasible", "infeasible", "none"]


@dataclass(frozen=True)
class Outcome:
    """`status` "feasible": the limit came first; "none": nothing found. `bound` is the proven objective
    bound, if any."""

    status: Status
    solver: str
    bound: float | None = None


class _WarmHiGHS(pulp.HiGHS):  # type: ignore[misc]
    """PuLP's HiGHS, started from the variables' values; PuLP itself hands them only to its file-based
    solvers."""

    def callSolver(self, lp: Any) -> None:
        import highspy

        start = highspy.HighsSolution()
        start.col_value = [0.0 if v.varValue is None else float(v.varValue) for v in lp.variables()]
        lp.solverModel.setSolution(start)
        lp.solverModel.run()


def solve_program(
    model: pulp.LpProblem,
    time_limit_s: float | None,
    relative_gap: float,
    warm: bool = False,
    prefer: str = "highs",
) -> Outcome:
    """Solve on one thread, from the variables' values if `warm`. Raises RuntimeError where PuLP has no
    solver."""
    names = pulp.listSolvers(onlyAvailable=True)
    if prefer == "highs" and "HiGHS" in names:
        kind = _WarmHiGHS if warm else pulp.HiGHS
        model.solve(kind(msg=False, threads=1, timeLimit=time_limit_s, gapRel=relative_gap))
        info = model.solverModel.getInfo()
        bound = (
            float(info.mip_dual_bound) if any(v.cat == pulp.LpInteger for v in model.variables()) else None
        )
        found = int(info.primal_solution_status) == 2
        return Outcome(_status(model, found), "highs", bound)
    if "PULP_CBC_CMD" in names:
        options = {"timeLimit": time_limit_s, "gapRel": relative_gap, "warmStart": warm}
        model.solve(pulp.PULP_CBC_CMD(msg=False, threads=1, **options))
        return Outcome(_status(model, model.sol_status in (pulp.LpSolutionOptimal, 2)), "cbc")
    raise RuntimeError("PuLP finds neither HiGHS nor CBC: install highspy")


def _status(model: pulp.LpProblem, found: bool) -> Status:
    if model.status == pulp.LpStatusInfeasible:
        return "infeasible"
    if not found:
        return "none"
    return "optimal" if model.sol_status == pulp.LpSolutionOptimal else "feasible"
