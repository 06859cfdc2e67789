"""Pictures of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

INK, GRID = "#1c2430", "#e3e7ec"
COLOURS = ("#0067a8", "#c9500a", "#00835f", "#a8518a", "#9a6b00", "#3d8fc4")


def heat_map(
    scores: np.ndarray, depths: Sequence[float], lengths: Sequence[int], context: int | None, path: Path
) -> None:
    """Scores [depths, lengths] from 0 to 1 as a PNG, with a line where the model's context ends."""
    figure = Figure(figsize=(3.4 + 0.75 * len(lengths), 2.2 + 0.42 * len(depths)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(scores, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30, ha="right")
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("depth of the needle")
    for d, row in enumerate(scores):
        for n, value in enumerate(row):
            colour = "white" if value < 0.55 else INK
            axes.text(n, d, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    if context is not None:
        within = sum(length <= context for length in lengths)
        if 0 < within < len(lengths):
            axes.axvline(within - 0.5, color="#c9500a", linewidth=2)
        axes.set_title(f"Needle retrieved\n(context of the model: {context:,} tokens)", fontsize=10)
    figure.colorbar(image, label="share of references found")
    figure.savefig(path, dpi=150)


def loss_curves(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss by position and by document length, a line a window, as a PNG."""
    figure = Figure(figsize=(10.5, 4.0), layout="constrained")
    titles = (
        ("by_position", "position in the document"),
        ("by_document_length", "tokens of the document"),
    )
    for axes, (field, label) in zip(figure.subplots(1, 2, sharey=True), titles, strict=True):
        ends = sorted({end for result in results for end in result[field]})
        for i, result in enumerate(results):
            values = result[field]
            axes.plot(
                [ends.index(end) for end in values],
                list(values.values()),
                marker="o",
                markersize=4,
                color=COLOURS[i % len(COLOURS)],
                label=f"window {result['window']:,}",
            )
        axes.set_xticks(range(len(ends)), [f"< {end:,}" for end in ends], rotation=30, ha="right")
        axes.set_xlabel(label)
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("loss (nats/token)")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=150)
