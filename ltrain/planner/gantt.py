"""A plan as a picture: ranks down, predicted time across, one colour per degree."""

from __future__ import annotations

from pathlib import Path

from ltrain.planner.plan import Plan


def draw(plan: Plan, path: str | Path, title: str = "") -> None:
    """Write a PNG. White is idle time: waiting for the slowest group of the micro-batch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(11, max(3.0, min(9.0, 0.11 * plan.num_devices + 1.5))), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    degrees = sorted({group.degree for groups in plan.micro_batches for group in groups})
    palette = [
        "#4477aa",
        "#66ccee",
        "#228833",
        "#ccbb44",
        "#ee6677",
        "#aa3377",
        "#bbbbbb",
        "#994455",
        "#997700",
    ]
    colour = {degree: palette[i % len(palette)] for i, degree in enumerate(degrees)}
    start = 0.0
    for groups in plan.micro_batches:
        for group in groups:
            for first, count in _runs(group.ranks):
                axes.broken_barh(
                    [(start, group.predicted_s)],
                    (first - 0.48, count - 0.04),
                    facecolors=colour[group.degree],
                    edgecolor="white",
                    linewidth=0.4,
                )
        start += max(group.predicted_s for group in groups)
        axes.axvline(start, color="#444444", linewidth=0.8)
    axes.set_xlim(0, start)
    axes.set_ylim(plan.num_devices - 0.5, -0.5)
    axes.set_xlabel("predicted time, s")
    axes.set_ylabel("rank")
    axes.set_title(title or f"{plan.predicted_s:.2f} s, {100 * plan.gap:.1f} % above the bound")
    handles = [Patch(color=colour[degree], label=f"degree {degree}") for degree in degrees]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.tight_layout()
    figure.savefig(str(path))


def _runs(ranks: tuple[int, ...]) -> list[tuple[int, int]]:
    """Consecutive ranks as (first, count)."""
    runs: list[tuple[int, int]] = []
    for rank in sorted(ranks):
        if runs and rank == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((rank, 1))
    return runs
