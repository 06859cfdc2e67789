"""Table and curves from the JSON files of sync_quality.py.

python tools/bench/sync_quality_report.py FILES... [--figure docs/benchmarks/sync_quality.svg]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+")
    parser.add_argument("--figure", default="docs/benchmarks/sync_quality.svg")
    args = parser.parse_args()
    curves: dict[str, dict[int, list[float]]] = defaultdict(dict)
    nbytes, every, start = {}, 1, {}
    for file in args.files:
        found = json.loads(Path(file).read_text())
        every = found["arguments"]["eval_every"]
        for row in found["rows"]:
            curves[row["method"]][row["seed"]] = row["curve"]
            nbytes[row["method"]] = row["bytes_up"]
            start[row["seed"]] = row["start"]
    reference = next(name for name in curves if name.startswith("every step"))
    print("| method | final loss by seed | mean | beside every step | sent by a replica | fewer bytes |")
    print("|---|---|---|---|---|---|")
    for name, seeds in curves.items():
        final = {seed: curve[-1] for seed, curve in sorted(seeds.items())}
        mean = statistics.mean(final.values())
        gaps = [final[s] / curves[reference][s][-1] - 1 for s in final if s in curves[reference]]
        values = " ".join(f"{value:.4f}" for value in final.values())
        gap = f"{100 * statistics.mean(gaps):+.2f} %" if gaps else ""
        less = nbytes[reference] / nbytes[name]
        print(f"| {name} | {values} | {mean:.4f} | {gap} | {nbytes[name] / 1e6:.2f} MB | {less:.0f}x |")
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5))
    for name, seeds in curves.items():
        mean = [statistics.mean(values) for values in zip(*seeds.values(), strict=True)]
        steps = [every * (i + 1) for i in range(len(mean))]
        axes.plot(steps, mean, label=name, linewidth=2.5 if name == reference else 1.2)
    axes.set_xlabel("step")
    axes.set_ylabel(f"held-out loss, nats a byte, mean of {len(start)} seeds")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.figure)


if __name__ == "__main__":
    main()
