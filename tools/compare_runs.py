"""Two or more runs in numbers: loss at equal tokens, speed, memory, each against the first run.

    python tools/compare_runs.py outputs/A outputs/B [--png FILE]

Runs are compared up to the tokens that all of them have seen. `ltrain report A B` draws every panel.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from ltrain.config.base import ConfigError
from ltrain.report.runs import RunLog, read_run

WINDOW = 10


def loss_at(run: RunLog, tokens: float) -> float | None:
    """Mean training loss of the last ten records up to `tokens`; None without any."""
    x, y = run.series("train/loss")
    found = [loss for at, loss in zip(x, y, strict=True) if at <= tokens][-WINDOW:]
    return statistics.fmean(found) if found else None


def shared_tokens(runs: Sequence[RunLog]) -> float:
    """Tokens that every run has seen."""
    return min(max(run.series("train/loss")[0], default=0.0) for run in runs)


def median_of(run: RunLog, name: str) -> float | None:
    """Median over the run, its first record left out; None where the run has no such metric."""
    values = run.values(name, skip_first=True)
    return statistics.median(values) if values else None


def facts(runs: Sequence[RunLog]) -> dict[str, list[float | None]]:
    """Name of a fact to its value in every run."""
    tokens = shared_tokens(runs)
    rows: dict[str, list[float | None]] = {
        f"training loss at {part * tokens:,.0f} tokens": [loss_at(run, part * tokens) for run in runs]
        for part in (0.25, 0.5, 1.0)
    }
    rows["held-out loss, last"] = [run.evaluations[-1].loss if run.evaluations else None for run in runs]
    rows["tokens/s, median"] = [median_of(run, "perf/tokens_per_s") for run in runs]
    rows["MFU, median"] = [median_of(run, "perf/mfu") for run in runs]
    rows["step time, median, s"] = [median_of(run, "perf/step_time_s") for run in runs]
    rows["peak memory, GiB"] = [max(run.values("mem/max_allocated_gib"), default=None) for run in runs]
    return {name: values for name, values in rows.items() if any(v is not None for v in values)}


def draw(runs: Sequence[RunLog], path: Path) -> None:
    """Loss over tokens, as a PNG."""
    from ltrain.report.figures import draw, to_png
    from ltrain.report.panels import PANELS
    from ltrain.report.theme import LIGHT

    panel = next(panel for panel in PANELS if panel.key == "loss_tokens")
    figure = draw(panel, runs, LIGHT)
    if figure is None:
        raise ConfigError("--png", str(path), "cannot be drawn: no run has a training loss")
    path.write_bytes(to_png(figure))


def main() -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--png", type=Path, default=None, metavar="FILE", help="draw the losses over tokens")
    args = parser.parse_args()
    try:
        if len(args.runs) < 2:
            raise ConfigError("RUN", len(args.runs), "must be two runs or more")
        runs = [read_run(folder) for folder in args.runs]
        table = Table(title=f"against {runs[0].folder}")
        table.add_column("")
        for run in runs:
            table.add_column(Text(str(run.folder)), justify="right", overflow="fold")
        for name, values in facts(runs).items():
            base = values[0]
            cells = ["-" if v is None else f"{v:,.4g}" for v in values]
            for i, value in enumerate(values[1:], 1):
                if value is not None and base:
                    cells[i] += f" ({value / base:.3f}x)"
            table.add_row(name, *cells)
        Console().print(table)
        if args.png is not None:
            draw(runs, args.png)
    except ConfigError as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
