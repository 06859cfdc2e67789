"""Table and plot of pattern_quality.py, written into docs/benchmarks/pattern_quality.md between its marks."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import pages

matplotlib.use("Agg")
from matplotlib import pyplot

DISTANCES = ("128", "512", "1024", "2048", "4096")


def write_report(folder: Path, docs: Path) -> None:
    """Put the tables and the figure of the arms in `folder` into the page in `docs`."""
    arms: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for path in sorted(folder.glob("*-*.json")):
        row = json.loads(path.read_text())
        arms[row["pattern"]][row["seed"]] = row
    dense = arms["dense"]
    names = ["dense", *sorted((n for n in arms if n != "dense"), key=lambda n: _mean(arms[n], "loss"))]
    text = "\n\n".join([_loss_table(names, arms, dense), _recall_table(names, arms)])
    page = docs / "pattern_quality.md"
    pages.put(page, text, "results")
    _plot(names, arms, docs / "pattern_quality.png")
    print(text)


def _mean(rows: dict[int, dict[str, Any]], field: str) -> float:
    return statistics.mean(row[field] for row in rows.values())


def _loss_table(names: list[str], arms: Any, dense: dict[int, dict[str, Any]]) -> str:
    ends = list(next(iter(dense.values()))["by_position"])
    head = ["pattern", "density", "held-out loss by seed", "over dense", "train loss over dense, worst seed"]
    lines = [
        "| " + " | ".join([*head, *(f"to {end}" for end in ends)]) + " |",
        "|---" * (5 + len(ends)) + "|",
    ]
    for name in names:
        rows = arms[name]
        seeds = sorted(set(rows) & set(dense))
        over = statistics.mean(rows[s]["loss"] / dense[s]["loss"] - 1 for s in seeds)
        worst = max((max(curve_gaps(rows[s]["curve"], dense[s]["curve"]), key=abs) for s in seeds), key=abs)
        losses = " ".join(f"{rows[s]['loss']:.4f}" for s in sorted(rows))
        cells = [f"`{name}`", f"{_mean(rows, 'density'):.3f}", losses]
        cells += ["" if name == "dense" else f"{100 * value:+.2f} %" for value in (over, worst)]
        cells += [f"{statistics.mean(r['by_position'][end] for r in rows.values()):.3f}" for end in ends]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def curve_gaps(curve: list[float], dense: list[float]) -> list[float]:
    """Relative gaps to the dense curve at equal steps, over means of 8 neighbouring steps."""
    width = min(8, len(dense))
    own, other = (
        [statistics.mean(x[i : i + width]) for i in range(len(dense) - width + 1)] for x in (curve, dense)
    )
    return [a / b - 1 for a, b in zip(own, other, strict=True)]


def _recall_table(names: list[str], arms: Any) -> str:
    lines = ["| pattern | " + " | ".join(f"to {d}" for d in DISTANCES) + " | all |", "|---" * 7 + "|"]
    for name in names:
        asked, right = (
            [sum(r["recall"][what][i] for r in arms[name].values()) for i in range(len(DISTANCES))]
            for what in ("asked", "right")
        )
        cells = [f"{100 * b / a:.1f} %" if a else "" for a, b in zip(asked, right, strict=True)]
        lines.append(f"| `{name}` | " + " | ".join([*cells, f"{100 * sum(right) / sum(asked):.1f} %"]) + " |")
    counts = [sum(r["recall"]["asked"][i] for r in arms["dense"].values()) for i in range(len(DISTANCES))]
    lines.append("| recalls | " + " | ".join(f"{n:.0f}" for n in [*counts, sum(counts)]) + " |")
    return "\n".join(lines)


def _plot(names: list[str], arms: Any, path: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.5, 4.2))
    dense = arms["dense"]
    for name in names:
        rows = arms[name]
        width = 2.4 if name == "dense" else 1.1
        gaps = [curve_gaps(row["curve"], dense[seed]["curve"]) for seed, row in rows.items() if seed in dense]
        means = [100 * statistics.mean(values) for values in zip(*gaps, strict=True)]
        left.plot(range(8, 8 + len(means)), means, label=name, linewidth=width)
        ends = list(next(iter(rows.values()))["by_position"])
        means = [statistics.mean(row["by_position"][end] for row in rows.values()) for end in ends]
        right.plot(ends, means, marker="o", markersize=3, label=name, linewidth=width)
    left.set_xlabel("step")
    left.set_ylabel("training loss over dense, %, means of 8 steps")
    left.set_ylim(-1, 8)
    right.set_xlabel("position in the document, up to")
    right.set_ylabel("held-out loss, nats a byte")
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
