"""A Weights & Biases workspace with the report's panels, over the names that every run logs.

    python tools/wandb_workspace.py ENTITY PROJECT          create it (needs `wandb-workspaces` and a key)
    python tools/wandb_workspace.py --json FILE             write the panels as JSON instead

Without `wandb-workspaces` the first form says so, writes `wandb_workspace.json`, and exits with 3.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ltrain.metrics.names import METRICS, PREFIXES
from ltrain.report.panels import (
    PANELS,
    PHASES,
    ByLayer,
    ByPosition,
    Lines,
    StepTime,
)

EXIT_MISSING = 3
SECTIONS = {
    "Loss": ("train", "eval"),
    "Speed": ("perf", "time"),
    "Balance": ("balance",),
    "Memory": ("mem",),
    "Data": ("data",),
    "Sparsity": ("sparse",),
    "Elimination": ("elim",),
    "Exchange and sync": ("comm", "sync"),
    "GPU": ("gpu",),
}
AXES = {"tokens": "train/tokens", "minutes": "RelativeTime(Wall)"}


def panel_list() -> list[dict[str, Any]]:
    """Every panel as plain data: section, title, x, y (metric names) or regex, log, stacked.

    Metrics of no panel of the report get a panel each, so that nothing that is logged is hidden.
    """
    found = []
    for panel in PANELS:
        entry = {"title": panel.title, "x": "train/tokens", "y": [], "regex": None, "log": False}
        entry["stacked"] = isinstance(panel, StepTime)
        match panel:
            case Lines():
                entry |= {"x": AXES[panel.x], "y": [name for name, _ in panel.metrics], "log": panel.log}
            case ByPosition():
                # Evaluations are records of their own, without a count of tokens.
                entry |= {"x": "train/step", "regex": "^eval/loss_pos/"}
            case ByLayer():
                entry |= {"regex": f"^{panel.prefix}"}
            case StepTime():
                entry |= {"y": [name for name, _ in PHASES]}
        found.append(entry)
    shown = {name for entry in found for name in entry["y"]}
    for name, metric in METRICS.items():
        if name not in shown:
            x = "train/step" if name.startswith("eval/") else "train/tokens"
            found.append(_single(metric.meaning, x, y=[name]))
    regexes = {entry["regex"] for entry in found}
    found += [
        _single(meaning, "train/tokens", regex=f"^{prefix}")
        for prefix, meaning in PREFIXES.items()
        if f"^{prefix}" not in regexes
    ]
    return [{"section": _section(entry), **entry} for entry in found]


def _single(title: str, x: str, *, y: list[str] | None = None, regex: str | None = None) -> dict[str, Any]:
    return {"title": title, "x": x, "y": y or [], "regex": regex, "log": False, "stacked": False}


def _section(entry: dict[str, Any]) -> str:
    name = entry["regex"].removeprefix("^") if entry["regex"] else entry["y"][0]
    return next(title for title, prefixes in SECTIONS.items() if name.split("/")[0] in prefixes)


def build_workspace(entity: str, project: str, panels: list[dict[str, Any]]) -> Any:
    """The workspace object of `wandb_workspaces`, not yet saved."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = []
    for title in SECTIONS:
        plots = [
            reports.LinePlot(
                title=panel["title"],
                x=panel["x"],
                y=panel["y"],
                metric_regex=panel["regex"],
                log_y=panel["log"],
                plot_type="stacked-area" if panel["stacked"] else "line",
            )
            for panel in panels
            if panel["section"] == title
        ]
        sections.append(workspaces.Section(name=title, panels=plots, is_open=title in ("Loss", "Speed")))
    return workspaces.Workspace(entity=entity, project=project, name="ltrain", sections=sections)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entity", nargs="?", help="user or team at Weights & Biases")
    parser.add_argument("project", nargs="?", default="ltrain", help="project of the runs")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the panels instead")
    args = parser.parse_args()
    panels = panel_list()
    if args.json is not None:
        args.json.write_text(json.dumps(panels, indent=2) + "\n")
        print(f"{len(panels)} panels: {args.json}")
        return 0
    if args.entity is None:
        parser.error("name the entity, or --json FILE")
    try:
        workspace = build_workspace(args.entity, args.project, panels)
    except ImportError as error:
        file = Path("wandb_workspace.json")
        file.write_text(json.dumps(panels, indent=2) + "\n")
        print(
            f"no workspace was created: {error}. Install it with: pip install wandb-workspaces\n"
            f"The {len(panels)} panels that it would hold are in {file}.",
            file=sys.stderr,
        )
        return EXIT_MISSING
    print(workspace.save().url)
    return 0


if __name__ == "__main__":
    sys.exit(main())
