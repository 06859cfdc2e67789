"""`ltrain report`: one page and its pictures from the folders of one or more runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ltrain.config.base import ConfigError
from ltrain.report import evaluations
from ltrain.report.figures import draw, to_png, to_svg
from ltrain.report.page import page
from ltrain.report.panels import PANELS
from ltrain.report.runs import RunLog, read_run
from ltrain.report.tables import Table, facts_table, position_table
from ltrain.report.theme import LIGHT, PLACEHOLDERS, with_variables


def write_report(folders: Sequence[Path], out: Path | None = None) -> tuple[Path, list[Table]]:
    """Write `report.html` and `report/*.png` into `out`, by default the first run's folder.

    Returns the page's path and its tables. Runs are compared where there are several. Raises ConfigError
    where a run cannot be read, before anything is written.
    """
    runs = _distinct([read_run(folder) for folder in folders])
    tables = [table for run in runs if (table := position_table(run)) is not None]
    tables.append(facts_table(runs))
    evaluated = [
        (f"{name} of {run.name}" if len(runs) > 1 else name, results)
        for run in runs
        for name, results in evaluations.read_evaluations(run.folder)
    ]
    for name, results in evaluated:
        tables += [replace(table, title=f"{name}: {table.title}") for table in evaluations.tables(results)]
    out = out or folders[0]
    pictures = out / "report"
    try:
        pictures.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise ConfigError("--out", str(out), rule, "choose another folder") from None
    charts = []
    for panel in PANELS:
        picture = draw(panel, runs, LIGHT)
        file = pictures / f"{panel.key}.png"
        if picture is None:
            file.unlink(missing_ok=True)  # of an earlier report
            continue
        file.write_bytes(to_png(picture))
        drawing = draw(panel, runs, PLACEHOLDERS)
        assert drawing is not None
        charts.append((panel.title, with_variables(to_svg(drawing, panel.key))))
    for number, (name, results) in enumerate(evaluated):
        for key, title, drawing in evaluations.figures(results, PLACEHOLDERS):
            charts.append((f"{name}: {title}", with_variables(to_svg(drawing, f"eval{number}_{key}"))))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(r.name for r in runs)}"
    path = out / "report.html"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page(title, _subtitle(runs), tables, charts))
    temporary.replace(path)
    return path, tables


def _subtitle(runs: list[RunLog]) -> str:
    records = sum(len(run.records) for run in runs)
    return f"From {records:,} records of metrics.jsonl. Medians and step times leave the first step out."


def _distinct(runs: list[RunLog]) -> list[RunLog]:
    """Runs of the same name, in different places, are told apart by their folders."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise ConfigError("RUN", [str(run.folder) for run in runs], "names a folder twice")
    root = os.path.commonpath([str(run.folder.resolve()) for run in runs])
    return [
        RunLog(run.folder, os.path.relpath(run.folder.resolve(), root), run.config, run.records)
        for run in runs
    ]


def print_report(folders: Sequence[Path], out: Path | None = None) -> int:
    """Write the report, and its tables to the terminal."""
    from rich.console import Console

    path, tables = write_report(folders, out)
    print_tables(tables)
    Console().print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def print_tables(tables: Sequence[Table]) -> None:
    """Tables on the terminal."""
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    console = Console()
    for table in tables:
        grid = Grid(title=Text(table.title), title_justify="left", title_style="bold")
        for i, head in enumerate(table.heads):
            grid.add_column(Text(head), justify="left" if i == 0 else "right", overflow="fold")
        for row in table.rows:
            grid.add_row(*map(Text, row))
        console.print(grid)
        for note in table.notes:
            console.print(note, markup=False, highlight=False)
        console.print()
