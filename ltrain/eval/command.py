"""The `ltrain eval` command and its results on the terminal."""

from __future__ import annotations

import argparse

from ltrain.eval.ranks import world
from ltrain.eval.run import run_eval
from ltrain.eval.settings import EvalSettings
from ltrain.report.evaluations import FILE, tables
from ltrain.report.write import print_tables


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
    if world().first:
        print_tables(tables(results))
        say(f"results: {out / FILE}")
    return 0
