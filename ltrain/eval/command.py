"""The `ltrain eval` command and its results on the terminal."""

from __future__ import annotations

import argparse
from typing import Any

from ltrain.eval.run import run_eval
from ltrain.eval.settings import EvalSettings


def run(args: argparse.Namespace) -> int:
    """Evaluate, and print what came out."""
    from rich.console import Console

    fields = {name: getattr(args, name) for name in EvalSettings.__dataclass_fields__}
    settings = EvalSettings(**{**fields, "depths": tuple(args.depths)})
    out = args.out or args.model.with_name(f"{args.model.name}-eval")
    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    results = run_eval(args.model, args.tasks, args.lengths, out, settings, say)
    for table in tables(results):
        console.print(table)
    say(f"results: {out / 'results.json'}")
    return 0


def tables(results: dict[str, Any]) -> list[Any]:
    """Rich tables of the results."""
    found = []
    lengths = results["lengths"]
    if "tasks" in results:
        rows = {
            name: [f"{cell['score']:.2f} ({cell['reference_loss']:.2f})" for cell in by_length.values()]
            for name, by_length in results["tasks"].items()
        }
        found.append(_table("Score (loss of the reference answer)", "task", lengths, rows))
    if "needle" in results:
        needle = results["needle"]
        rows = {
            f"{100 * depth:g} %": [f"{s:.2f} ({r:.2f})" for s, r in zip(scores, losses, strict=True)]
            for depth, scores, losses in zip(
                needle["depths"], needle["scores"], needle["reference_losses"], strict=True
            )
        }
        found.append(_table("Needle: score (loss of the reference answer)", "depth", lengths, rows))
    if "perplexity" in results:
        windows = [result["window"] for result in results["perplexity"]]
        for field, title in (("by_position", "position"), ("by_document_length", "document length")):
            ends = sorted({end for result in results["perplexity"] for end in result[field]})
            rows = {
                f"< {end:,}": [
                    f"{r[field][end]:.4f}" if end in r[field] else "-" for r in results["perplexity"]
                ]
                for end in ends
            }
            rows["all"] = [f"{r['loss']:.4f}" for r in results["perplexity"]]
            found.append(_table(f"Loss by {title} (nats a token), by window", title, windows, rows))
    for name, scores in results.get("lm_eval", {}).get("results", {}).items():
        rows = {key: [f"{v:.4f}"] for key, v in scores.items() if isinstance(v, float)}
        found.append(_table(f"lm-eval: {name}", "metric", ["value"], rows))
    return found


def _table(title: str, corner: str, columns: list[Any], rows: dict[str, list[str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(corner)
    for column in columns:
        table.add_column(f"{column:,}" if isinstance(column, int) else str(column), justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table
