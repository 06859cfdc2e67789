"""`ltrain report --elimination DIR`: table and plot of tools/bench/elimination_quality.py."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

from ltrain.config.base import ConfigError
from ltrain.report.theme import LIGHT

matplotlib.use("Agg")
from matplotlib import pyplot

BEGIN, END = "<!-- elimination study: begin -->", "<!-- elimination study: end -->"
NEEDED = (
    "arm",
    "seed",
    "text_loss",
    "recall_loss",
    "recall_accuracy",
    "saved_bytes_per_token_layer",
    "row_tokens",
    "tflop",
)

Rows = dict[str, dict[int, dict[str, Any]]]


def read_study(folder: Path) -> Rows:
    """Results by arm and seed. Raises ConfigError where there are none or one can't be read."""
    found: Rows = defaultdict(dict)
    for file in sorted(folder.glob("*.json")):
        try:
            row = json.loads(file.read_text())
            missing = [name for name in NEEDED if name not in row]
        except (OSError, ValueError) as error:
            raise ConfigError("--elimination", str(file), f"cannot be read: {error}") from None
        if missing:
            raise ConfigError("--elimination", str(file), f"is no result of the study: {missing} missing")
        found[row["arm"]][row["seed"]] = row
    if "dense" not in found:
        raise ConfigError(
            "--elimination", str(folder), "holds no results of the arm 'dense'",
            "run tools/bench/elimination_quality.py --out DIR",
        )  # fmt: skip
    order = sorted(found, key=lambda arm: (not arm.startswith("dense"), arm.split(", ")[0] != "qkv", arm))
    return {arm: found[arm] for arm in order}


def table(rows: Rows) -> str:
    """Markdown: means over seeds, losses also beside the dense arm of the same seed."""
    dense = rows["dense"]
    lines = [
        "| arm | seeds | text, nats a byte | less dense (each seed) | last quarter | recall, nats a byte | "
        "recalled | kept | bytes | FLOPs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = _row_bytes(dense), _mean(dense, "tflop")
    for arm, seeds in rows.items():
        gaps = [row["text_loss"] - dense[s]["text_loss"] for s, row in sorted(seeds.items()) if s in dense]
        gap = f"{statistics.mean(gaps):+.4f} ({' '.join(f'{g:+.4f}' for g in gaps)})" if gaps else ""
        lines.append(
            f"| {arm} | {len(seeds)} | {_mean(seeds, 'text_loss'):.4f} | {gap} | "
            f"{_mean(seeds, 'text_last_quarter_loss'):.4f} | {_mean(seeds, 'recall_loss'):.4f} | "
            f"{100 * _mean(seeds, 'recall_accuracy'):.1f} % | {_mean(seeds, 'kept_frac'):.2f} | "
            f"{_row_bytes(seeds) / base[0]:.2f} x | "
            f"{_mean(seeds, 'tflop') / base[1]:.2f} x |"
        )
    return "\n".join(lines)


def draw(rows: Rows, path: Path) -> None:
    """Loss on text and recall of every arm less dense of the same seed: points are seeds, bars means."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.34 * len(rows) + 1.4), sharey=True)
    arms = [arm for arm in rows if arm != "dense"]
    dense = rows["dense"]
    for axis, name, title in (
        (axes[0], "text_loss", "text: nats a byte above dense"),
        (axes[1], "recall_accuracy", "recall: values found, less dense's"),
    ):
        for place, arm in enumerate(arms):
            gaps = [row[name] - dense[s][name] for s, row in sorted(rows[arm].items()) if s in dense]
            colour = LIGHT.series[0 if "random" not in arm and "recency" not in arm else 1]
            axis.barh(place, statistics.mean(gaps), color=colour, alpha=0.45)
            axis.plot(gaps, [place] * len(gaps), "o", color=colour, markersize=4)
        axis.axvline(0, color=LIGHT.muted, linewidth=1)
        axis.set_title(title, fontsize=10, color=LIGHT.ink)
        axis.grid(axis="x", color=LIGHT.grid)
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(arms)), arms, fontsize=8)
    axes[0].invert_yaxis()
    figure.text(0.99, 0.01, "orange: controls (random, recency)", ha="right", fontsize=8, color=LIGHT.muted)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_study(folder: Path, page: Path | None = None) -> str:
    """Write `elimination.png` beside the results, or beside `page` and put the table between its marks.

    Returns the table. Raises ConfigError where results or marks are missing.
    """
    rows = read_study(folder)
    text = table(rows)
    if page is None:
        draw(rows, folder / "elimination.png")
        (folder / "elimination.md").write_text(text + "\n")
        return text
    try:
        whole = page.read_text()
    except OSError as error:
        raise ConfigError("--page", str(page), f"cannot be read: {error.strerror}") from None
    if BEGIN not in whole or END not in whole:
        raise ConfigError("--page", str(page), f"must hold the lines {BEGIN} and {END}")
    picture = page.with_suffix(".png")
    draw(rows, picture)
    before, rest = whole.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    filled = f"{text}\n\n![losses beside dense]({picture.name})"
    page.write_text(f"{before}{BEGIN}\n{filled}\n{END}{after}")
    return text


def _mean(seeds: dict[int, dict[str, Any]], name: str) -> float:
    return statistics.mean(row[name] for row in seeds.values())


def _row_bytes(seeds: dict[int, dict[str, Any]]) -> float:
    """Bytes that a layer saves of one row: a shorter row has fewer tokens."""
    return _mean(seeds, "saved_bytes_per_token_layer") * _mean(seeds, "row_tokens")
