"""Panels as matplotlib figures."""

from __future__ import annotations

import io
import re
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator

from ltrain.report.panels import (
    INSIDE_FORWARD_BACKWARD,
    PHASES,
    ByLayer,
    ByPosition,
    Lines,
    Panel,
    StepTime,
)
from ltrain.report.runs import RunLog
from ltrain.report.tables import bucket_labels
from ltrain.report.theme import Theme

STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.6)), (0, (5, 1.5, 1, 1.5)))
SMOOTH_FROM = 100
MAX_AREA_POINTS = 300
SMALL_SHARE = 0.003


def draw(panel: Panel, runs: Sequence[RunLog], theme: Theme) -> Figure | None:
    """The panel as a figure, None where no run has data for it."""
    figure = Figure(figsize=(6.6, 3.7), layout="constrained", facecolor=theme.surface)
    axes = figure.add_subplot()
    _style(axes, theme)
    drawers: dict[type, Any] = {
        Lines: _lines,
        ByPosition: _by_position,
        StepTime: _step_time,
        ByLayer: _by_layer,
    }
    if not drawers[type(panel)](axes, panel, runs, theme):
        return None
    axes.set_ylabel(panel.unit, color=theme.muted)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        columns = 1 if max(map(len, labels)) > 34 else 2 if max(map(len, labels)) > 18 else 4
        legend = figure.legend(
            handles,
            labels,
            loc="outside lower left",
            ncols=min(columns, len(labels)),
            frameon=False,
            fontsize=9,
            handlelength=2.2,
        )
        for text in legend.get_texts():
            text.set_color(theme.ink)
    return figure


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def to_svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element for a page: same input, same text; letters are outlines, so that no
    font of the reader's makes them overlap.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": label, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # Names of parts are unique within a figure only; a page holds many.
    prefix = re.sub(r"\W", "_", label)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    return re.sub(r"\n\s*", "\n", svg)


def short(name: str, longest: int = 30) -> str:
    """A name for a legend: its middle is left out where it is long."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor("none")
    axes.tick_params(which="both", colors=theme.muted, labelsize=9, length=0)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(theme.grid)


def _x_axis(axes: Axes, kind: str, theme: Theme) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if kind == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens" if kind == "tokens" else "minutes since the first record", color=theme.muted)


def _lines(axes: Axes, panel: Lines, runs: Sequence[RunLog], theme: Theme) -> bool:
    present = [m for m in panel.metrics if any(run.series(m[0])[0] for run in runs)]
    if not present:
        return False
    for r, run in enumerate(runs):
        for m, (name, label) in enumerate(present):
            x, y = run.series(name, x=panel.x)
            if not x:
                continue
            # One run: a colour a metric. Several: a colour a run, a dash a metric.
            colour = theme.series[(m if len(runs) == 1 else r) % len(theme.series)]
            dash = STYLES[0] if len(runs) == 1 else STYLES[m % len(STYLES)]
            text = _label(run, label, runs, len(present) + len(panel.markers))
            _curve(axes, x, y, colour, dash, text, smooth=panel.smooth)
        for name, label in panel.markers:
            x, y = run.series(name, x=panel.x)
            if x:
                index = len(present) if len(runs) == 1 else r
                colour = theme.series[index % len(theme.series)]
                text = _label(run, label, runs, len(present) + 1)
                axes.plot(x, y, "o", color=colour, markersize=6, markeredgecolor=theme.surface, label=text)
    if panel.log and all(v > 0 for run in runs for name, _ in present for v in run.values(name)):
        axes.set_yscale("log")
        for axis_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            axis_ticks(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    elif panel.bottom is not None:
        top = max(v for run in runs for name, _ in present for v in run.values(name))
        if top > panel.bottom:
            axes.set_ylim(panel.bottom, top + 0.08 * (top - panel.bottom))
    if panel.unit in ("B", "tokens", "tokens/s") and not panel.log:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _x_axis(axes, panel.x, theme)
    return True


def _label(run: RunLog, metric: str, runs: Sequence[RunLog], num_metrics: int) -> str:
    if len(runs) == 1:
        return metric
    return short(run.name) if num_metrics == 1 else f"{short(run.name, 24)}: {metric}"


def _curve(
    axes: Axes, x: list[float], y: list[float], colour: str, dash: Any, label: str, *, smooth: bool
) -> None:
    """The values; many of them are drawn thin below their running mean."""
    if len(x) < SMOOTH_FROM or not smooth:
        marker = "o" if len(x) < 3 else ""
        axes.plot(x, y, color=colour, linestyle=dash, linewidth=1.8, marker=marker, markersize=4, label=label)
        return
    width = max(5, len(x) // 50)
    axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.35)
    axes.plot(x, running_mean(y, width), color=colour, linestyle=dash, linewidth=1.8, label=label)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and the `width - 1` before it, of fewer at the start."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= width:
            total -= values[i - width]
        means.append(total / min(i + 1, width))
    return means


def _by_position(axes: Axes, panel: ByPosition, runs: Sequence[RunLog], theme: Theme) -> bool:
    labels: dict[int, str] = {}
    for run in runs:
        for evaluation in run.evaluations:
            labels |= bucket_labels(evaluation)
    if not labels:
        return False
    ends = sorted(labels)
    place = {end: i for i, end in enumerate(ends)}
    for r, run in enumerate(runs):
        evaluations = [e for e in run.evaluations if e.by_position]
        if not evaluations:
            continue
        chosen = [("before", evaluations[0])] if len(evaluations) > 1 else []
        chosen.append(("after" if chosen else f"step {evaluations[0].step}", evaluations[-1]))
        for when, evaluation in chosen:
            at = [place[end] for end in evaluation.by_position]
            late = when != "before"
            colour = theme.series[r % len(theme.series)] if len(runs) > 1 or late else theme.series[1]
            axes.plot(
                at,
                list(evaluation.by_position.values()),
                color=colour,
                linestyle="-" if late else STYLES[1],
                marker="o" if late else "s",
                markersize=6,
                linewidth=2,
                label=_label(run, f"{when} (step {evaluation.step})" if chosen[1:] else when, runs, 2),
            )
    _mark_context(axes, ends, {run.base_context for run in runs}, theme)
    texts = [f"{labels[end].split(' ')[0]}–\n{labels[end].split(' ')[-1]}" for end in ends]
    axes.set_xticks(range(len(ends)), texts)
    axes.set_xlabel("position in the document", color=theme.muted)
    axes.set_xlim(-0.5, len(ends) - 0.5)
    return True


def _mark_context(axes: Axes, ends: list[int], contexts: set[int | None], theme: Theme) -> None:
    """A line where the base model's context ends, if that is a border of two buckets."""
    if len(contexts) != 1:
        return
    (context,) = contexts
    if context not in ends[:-1]:
        return
    at = ends.index(context) + 0.5
    axes.axvline(at, color=theme.muted, linewidth=1.2, linestyle=STYLES[2])
    # A title has room of its own: no curve runs through the words.
    axes.set_title(
        f"dotted: the base model's context, {context:,} tokens", loc="right", fontsize=9, color=theme.muted
    )


def _step_time(axes: Axes, panel: StepTime, runs: Sequence[RunLog], theme: Theme) -> bool:
    stacks = [stack for run in runs if (stack := phase_stack(run))[0]]
    if not stacks:
        return False
    names = list(dict.fromkeys(name for _, parts in stacks for name in parts))
    if len(runs) == 1:
        x, parts = stacks[0]
        axes.stackplot(
            x, *parts.values(), labels=list(parts), colors=[_phase_colour(n, names, theme) for n in parts]
        )
        _x_axis(axes, "tokens", theme)
        axes.margins(x=0)
        return True
    shown = [run for run in runs if phase_stack(run)[0]]
    bottom = [0.0] * len(shown)
    for name in names:
        heights = [statistics.fmean(parts[name]) if name in parts else 0.0 for _, parts in stacks]
        axes.bar(
            range(len(shown)),
            heights,
            bottom=bottom,
            width=0.6,
            label=name,
            color=_phase_colour(name, names, theme),
        )
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(shown)), [short(run.name, 60 // len(shown) + 4) for run in shown])
    axes.grid(False, axis="x")
    return True


def _phase_colour(name: str, names: list[str], theme: Theme) -> str:
    return theme.muted if name == "other" else theme.series[names.index(name) % len(theme.series)]


def phase_stack(run: RunLog) -> tuple[list[float], dict[str, list[float]]]:
    """Tokens and, by phase, seconds of each training record after the first; long runs are averaged to few
    points. The slowest rank counts in every phase, so `other`, what is left of the step, may be 0. Phases
    that cannot be seen, of less than 0.3 % of the time, count as `other`.
    """
    records = [r for r in run.training if r.get("perf/step_time_s") is not None]
    records = records[1:] if len(records) > 1 else records
    if not any(r.get(name) for r in records for name, _ in PHASES):
        return [], {}
    parts: dict[str, list[float]] = {}
    for name, label in (*PHASES, *INSIDE_FORWARD_BACKWARD):
        values = [r.get(name) or 0.0 for r in records]
        if any(values):
            parts[label] = values
    inner = [parts[label] for _, label in INSIDE_FORWARD_BACKWARD if label in parts]
    outer = "forward, backward"
    if inner and outer in parts:
        rest = [max(0.0, whole - sum(p)) for whole, *p in zip(parts[outer], *inner, strict=True)]
        parts = {("rest of forward, backward" if k == outer else k): v for k, v in parts.items()}
        parts["rest of forward, backward"] = rest
    whole = [r["perf/step_time_s"] for r in records]
    parts = {name: values for name, values in parts.items() if sum(values) > SMALL_SHARE * sum(whole)}
    other = [max(0.0, t - sum(p)) for t, *p in zip(whole, *parts.values(), strict=True)]
    if sum(other) > SMALL_SHARE * sum(whole):
        parts["other"] = other
    x = [run.tokens(r["step"]) for r in records]
    width = -(-len(x) // MAX_AREA_POINTS)
    return _averaged(x, width), {name: _averaged(values, width) for name, values in parts.items()}


def _averaged(values: list[float], width: int) -> list[float]:
    return [statistics.fmean(values[i : i + width]) for i in range(0, len(values), width)]


def _by_layer(axes: Axes, panel: ByLayer, runs: Sequence[RunLog], theme: Theme) -> bool:
    shown = [(r, run, names) for r, run in enumerate(runs) if (names := run.family(panel.prefix))]
    if not shown:
        return False
    layers = list(dict.fromkeys(n.removeprefix(panel.prefix) for _, _, names in shown for n in names))
    width = 0.8 / len(shown)
    for i, (r, run, names) in enumerate(shown):
        last = {n.removeprefix(panel.prefix): run.values(n)[-1] for n in names if run.values(n)}
        at = [layers.index(layer) + (i - (len(shown) - 1) / 2) * width for layer in last]
        axes.bar(
            at, list(last.values()), width=width, color=theme.series[r % len(theme.series)], label=run.name
        )
    step = -(-len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.set_xlabel("layer", color=theme.muted)
    axes.set_ylim(0, None)
    axes.grid(False, axis="x")
    return True
