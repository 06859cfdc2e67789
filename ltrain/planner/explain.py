"""Plans as tables."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ltrain.planner.plan import Group, Plan


def plan_table(plan: Plan) -> Table:
    """One row per micro-batch and degree."""
    table = Table(
        title=f"{len(plan.lengths)} sequences, {sum(plan.lengths):,} tokens on {plan.num_devices} devices: "
        f"{plan.predicted_s:.3f} s, bound {plan.lower_bound_s:.3f} s (gap {100 * plan.gap:.1f} %)",
        caption="; ".join(plan.notes) or None,
    )
    table.add_column("micro-batch", justify="right")
    table.add_column("groups")
    for column in ("sequences", "longest", "tokens", "memory", "slowest s", "fastest s"):
        table.add_column(column, justify="right")
    for index, groups in enumerate(plan.micro_batches):
        idle = plan.num_devices - sum(group.degree for group in groups)
        for row, (label, members) in enumerate(_by_shape(groups)):
            sequences = [s for group in members for s in group.sequences]
            table.add_row(
                str(index) if row == 0 else "",
                label,
                str(len(sequences)),
                f"{max(plan.lengths[s] for s in sequences):,}",
                f"{sum(group.num_tokens for group in members):,}",
                f"{100 * max(group.fill for group in members):.0f} %",
                f"{max(group.predicted_s for group in members):.4f}",
                f"{min(group.predicted_s for group in members):.4f}",
            )
        if idle:
            table.add_row("", f"{idle} devices idle", "0", "", "0", "", "", "", style="dim")
        table.add_section()
    return table


def _by_shape(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    shapes: dict[tuple[int, str, bool], list[Group]] = {}
    for group in groups:
        shapes.setdefault((-group.degree, group.schedule, len(set(group.weights)) > 1), []).append(group)
    labels = []
    for (degree, schedule, uneven), members in sorted(shapes.items()):
        labels.append((f"{len(members)} x {-degree} {schedule}{', uneven' if uneven else ''}", members))
    return labels


def comparison_table(rows: Sequence[tuple[str, float]], tokens: int) -> Table:
    """Named step times beside the first row's: seconds, tokens per second, and how much faster the first
    is."""
    table = Table(title="predicted step")
    table.add_column("policy")
    for column in ("seconds", "tokens/s", "the plan is faster by"):
        table.add_column(column, justify="right")
    first = rows[0][1]
    for name, seconds in rows:
        table.add_row(name, f"{seconds:.3f}", f"{tokens / seconds:,.0f}", f"{seconds / first:.2f}x")
    return table


def to_text(*tables: Table, width: int = 118) -> str:
    """The tables in plain text without colours."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False, color_system=None)
    for table in tables:
        console.print(table)
    return out.getvalue()
