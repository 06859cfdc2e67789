"""Tables and curves from the folder of JSON files that sync_quality.py writes.

python tools/bench/sync_quality_report.py DIR [--figure docs/images/sync_quality.png] [--csv FILE]
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Rows = dict[int, dict[str, Any]]

REFERENCES = {"continued": "dp", "scratch": "s-dp"}
# Curves of the figure; the table has all arms.
SHOWN = {
    "continued": ["dp", "diloco", "diloco-published", "sparse-k16", "sparse-k64", "sparse-k256"],
    "scratch": ["s-dp", "s-diloco", "s-sparse", "s-half", "s-half-lossy", "s-all", "s-all-lossy"],
}


def read(folder: Path) -> dict[str, Rows]:
    """Rows by arm and seed, in the order in which the study lists the arms."""
    found: dict[str, Rows] = defaultdict(dict)
    for path in sorted(folder.glob("*.json")):
        row = json.loads(path.read_text())
        found[row["key"]][row["seed"]] = row
    return found


def table(arms: dict[str, Rows], kind: str, order: list[str]) -> list[str]:
    """A row an arm: final loss by seed, its distance from data parallelism on the same seeds, and bytes."""
    reference = arms[REFERENCES[kind]]
    lines = [
        "| method | final loss by seed | mean | beside data parallel | sent by a replica | fewer bytes |",
        "|---|---|---|---|---|---|",
    ]
    for key in order:
        rows = arms[key]
        final = {seed: row["curve"][-1] for seed, row in sorted(rows.items())}
        gaps = [100 * (loss / reference[seed]["curve"][-1] - 1) for seed, loss in final.items()]
        spread = f" ({min(gaps):+.2f} to {max(gaps):+.2f})" if key != REFERENCES[kind] else ""
        one = next(iter(rows.values()))
        less = reference[one["seed"]]["bytes_up"] / one["bytes_up"]
        lines.append(
            f"| {one['title']} | {' '.join(f'{loss:.4f}' for loss in final.values())} "
            f"| {statistics.mean(final.values()):.4f} | {statistics.mean(gaps):+.2f} %{spread} "
            f"| {one['bytes_up'] / 1e6:.2f} MB | {less:.0f}x |"
        )
    return lines


def write_csv(arms: dict[str, Rows], path: Path) -> None:
    """A line an arm and seed, with the held-out loss at every evaluation."""
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["start", "arm", "seed", "loss_at_start", "final_loss", "bytes_up", "cpu_s", "curve"])
        for key, rows in sorted(arms.items()):
            for seed, row in sorted(rows.items()):
                curve = " ".join(f"{loss:.4f}" for loss in row["curve"])
                losses = f"{row['start']:.4f}", f"{row['curve'][-1]:.4f}"
                out.writerow(
                    [row["start_kind"], key, seed, *losses, row["bytes_up"], f"{row['cpu_s']:.0f}", curve]
                )


def draw(arms: dict[str, Rows], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 4.8))
    for axes, (kind, shown) in zip(panels, SHOWN.items(), strict=True):
        keys = [key for key in shown if key in arms]
        if not keys:
            continue
        for key in keys:
            rows = list(arms[key].values())
            mean = [statistics.mean(at) for at in zip(*(row["curve"] for row in rows), strict=True)]
            every = rows[0]["settings"]["eval_every"]
            steps = [every * (i + 1) for i in range(len(mean))]
            width = 2.5 if key == REFERENCES[kind] else 1.3
            axes.plot(steps, mean, label=rows[0]["title"], linewidth=width)
        axes.set_title({"continued": "continued training", "scratch": "from random weights"}[kind])
        axes.set_xlabel("step")
        axes.legend(fontsize=7)
        # The end decides; the fall of the first steps would flatten it.
        ends = [row["curve"][-1] for key in keys for row in arms[key].values()]
        axes.set_ylim(min(ends) - 0.01, max(ends) + (0.1 if kind == "continued" else 0.5))
    seeds = len({seed for rows in arms.values() for seed in rows})
    panels[0].set_ylabel(f"held-out loss, nats a byte, mean of {seeds} seeds")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--figure", type=Path, default=Path("docs/images/sync_quality.png"))
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    arms = read(args.folder)
    for kind, reference in REFERENCES.items():
        if reference not in arms:
            continue
        of_kind = [key for key, rows in arms.items() if next(iter(rows.values()))["start_kind"] == kind]
        mean = {key: statistics.mean(row["curve"][-1] for row in arms[key].values()) for key in of_kind}
        starts = [row["start"] for row in arms[reference].values()]
        print(f"\n{kind}: start {' '.join(f'{loss:.4f}' for loss in starts)}\n")
        print("\n".join(table(arms, kind, sorted(of_kind, key=mean.__getitem__))))
    every = [row for rows in arms.values() for row in rows.values()]
    print(f"\n{len(every)} arms, {sum(row['cpu_s'] for row in every) / 60:.1f} core-minutes")
    draw(arms, args.figure)
    if args.csv:
        write_csv(arms, args.csv)


if __name__ == "__main__":
    main()
