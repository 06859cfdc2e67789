"""What `ltrain eval` found: its results.json as tables and as pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ltrain.config.base import ConfigError
from ltrain.report.tables import Table
from ltrain.report.theme import LIGHT, Theme

SCHEMA_VERSION = 2
FILE = "results.json"
Results = dict[str, Any]


def read_evaluations(run: Path) -> list[tuple[str, Results]]:
    """The evaluations in folders of a run, by folder name. Raises ConfigError on a damaged one."""
    found = []
    for path in sorted(run.glob(f"*/{FILE}")):
        try:
            results = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(FILE, str(path), f"cannot be read: {error}", "evaluate again") from None
        schema = results.get("schema") if isinstance(results, dict) else None
        if schema != SCHEMA_VERSION:
            rule = f"is of schema {schema!r}; this version reads schema {SCHEMA_VERSION}"
            raise ConfigError(FILE, str(path), rule, "evaluate again, or remove the file")
        found.append((path.parent.name, results))
    return found


def tables(results: Results) -> list[Table]:
    """Scores by task and length, the needle by depth, losses by position and document length, the cache."""
    heads = tuple(f"{length:,}" for length in results["lengths"])
    found = []
    if "tasks" in results:
        rows = tuple(
            (name, *(_cell(cell["score"], cell["reference_loss"]) for cell in by_length.values()))
            for name, by_length in results["tasks"].items()
        )
        found.append(Table("Score (loss of the reference answer)", ("task", *heads), rows, _note(results)))
    if "needle" in results:
        needle = results["needle"]
        parts = (needle["depths"], needle["scores"], needle["reference_losses"])
        rows = tuple(
            (f"{100 * depth:g} %", *map(_cell, scores, losses))
            for depth, scores, losses in zip(*parts, strict=True)
        )
        title = "Needle: score (loss of the reference answer)"
        found.append(Table(title, ("depth", *heads), rows))
    if "perplexity" in results:
        found += [_losses(results["perplexity"], *which) for which in _BUCKETS]
    if caches := _caches(results):
        rows = tuple((name, *cells) for name, cells in caches)
        found.append(Table("Key/value cache after the question, over a dense one's", ("task", *heads), rows))
    for name, scores in results.get("lm_eval", {}).get("results", {}).items():
        rows = tuple((key, f"{v:.4f}") for key, v in scores.items() if isinstance(v, float))
        found.append(Table(f"lm-eval: {name}", ("metric", "value"), rows))
    return found


_BUCKETS = (("by_position", "position"), ("by_document_length", "document length"))


def _cell(score: float, reference_loss: float) -> str:
    return f"{score:.2f} ({reference_loss:.2f})"


def _note(results: Results) -> tuple[str, ...]:
    attention = results["attention"]
    return (
        f"Attention: {attention['pattern']['kind']}. Samples of a task and length: {results['samples']}.",
    )


def _losses(perplexity: list[Results], field: str, title: str) -> Table:
    ends = sorted({int(end) for result in perplexity for end in result[field]})
    # Keys are whole numbers as they are made and texts as they are read.
    columns = [{int(end): loss for end, loss in result[field].items()} for result in perplexity]
    rows = [
        (f"< {end:,}", *(f"{column[end]:.4f}" if end in column else "-" for column in columns))
        for end in ends
    ]
    rows.append(("all", *(f"{result['loss']:.4f}" for result in perplexity)))
    heads = (title, *(f"window {result['window']:,}" for result in perplexity))
    return Table(f"Loss by {title}, nats a token", heads, tuple(rows))


def _caches(results: Results) -> list[tuple[str, list[str]]]:
    """Tasks whose cache was smaller than, or other than, a dense one."""
    found = []
    for name, by_length in results.get("tasks", {}).items():
        caches = [cell.get("cache") for cell in by_length.values()]
        if any(cache and cache["bytes"] != cache["dense_bytes"] for cache in caches):
            found.append((name, [_share(cache) for cache in caches]))
    return found


def _share(cache: Results | None) -> str:
    if not cache:
        return "-"
    return f"{cache['bytes'] / 2**20:.1f} MiB, {cache['bytes'] / cache['dense_bytes']:.1%}"


def figures(results: Results, theme: Theme) -> Iterator[tuple[str, str, Figure]]:
    """(key, title, figure) of every picture that the results give."""
    heads = [f"{length:,}" for length in results["lengths"]]
    context = results["context"]
    border = sum(length <= context for length in results["lengths"]) if context else 0
    if "needle" in results:
        needle = results["needle"]
        rows = [f"{100 * depth:g} %" for depth in needle["depths"]]
        labels = ("tokens of context", "depth of the needle")
        yield "needle", "Needle retrieved", _grid(needle["scores"], rows, heads, labels, border, theme)
    if "tasks" in results:
        rows = list(results["tasks"])
        scores = [[cell["score"] for cell in cells.values()] for cells in results["tasks"].values()]
        figure = _grid(scores, rows, heads, ("tokens of context", ""), border, theme)
        yield "tasks", "Score by task and length", figure
    if "perplexity" in results:
        yield "perplexity", "Loss of held-out text by position and document length", _curves(results, theme)


def _grid(
    scores: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
    border: int,
    theme: Theme,
) -> Figure:
    """A heat map of scores from 0 to 1, with a line after `border` columns: there the context ends."""
    size = (3.6 + 0.75 * len(columns), 1.7 + 0.4 * len(rows))
    figure = Figure(figsize=size, layout="constrained", facecolor=theme.surface)
    axes = figure.add_subplot()
    axes.pcolormesh(scores, cmap="cividis", vmin=0, vmax=1, edgecolors="face", linewidth=0.3)
    axes.invert_yaxis()
    axes.set_xticks([i + 0.5 for i in range(len(columns))], columns, rotation=30, ha="right")
    axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
    axes.tick_params(colors=theme.muted, labelsize=9, length=0)
    axes.set_xlabel(labels[0], color=theme.muted)
    axes.set_ylabel(labels[1], color=theme.muted)
    for side in axes.spines.values():
        side.set_visible(False)
    for r, row in enumerate(scores):
        for c, value in enumerate(row):
            # On the colour of the cell, whatever the page's theme.
            colour = "#fefefe" if value < 0.55 else LIGHT.ink
            place = {"ha": "center", "va": "center", "fontsize": 8}
            axes.text(c + 0.5, r + 0.5, f"{value:.2f}", color=colour, **place)
    if 0 < border < len(columns):
        axes.axvline(border, color=theme.series[1], linewidth=2)
        # A title has room of its own: no cell lies behind the words.
        axes.set_title("line: the model's context", loc="right", fontsize=9, color=theme.muted)
    return figure


def _curves(results: Results, theme: Theme) -> Figure:
    figure = Figure(figsize=(9.6, 3.9), layout="constrained", facecolor=theme.surface)
    perplexity = results["perplexity"]
    pair = figure.subplots(1, 2, sharey=True)
    for axes, (field, label) in zip(pair, _BUCKETS, strict=True):
        ends = sorted({int(end) for result in perplexity for end in result[field]})
        for i, result in enumerate(perplexity):
            axes.plot(
                [ends.index(int(end)) for end in result[field]],
                list(result[field].values()),
                marker="o",
                markersize=5,
                linewidth=1.8,
                color=theme.series[i % len(theme.series)],
                label=f"window {result['window']:,}",
            )
        axes.set_facecolor("none")
        axes.set_xticks(range(len(ends)), [f"< {end:,}" for end in ends], rotation=30, ha="right")
        axes.set_xlabel(f"{label}, tokens", color=theme.muted)
        axes.tick_params(colors=theme.muted, labelsize=9, length=0)
        axes.grid(True, color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(theme.grid)
    pair[0].set_ylabel("nats/token", color=theme.muted)
    handles, labels = pair[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color(theme.ink)
    return figure
