"""The `ltrain` command: every subcommand checks its input first and exits with 2, and a line a fault, if it
is wrong.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ltrain import __version__
from ltrain.config.base import ConfigError

EXIT_BAD_INPUT = 2
BENCHMARKS = Path(__file__).resolve().parents[1] / "tools" / "bench"

Command = Callable[[argparse.Namespace, list[str]], int]


def _config(args: argparse.Namespace, overrides: list[str]) -> Any:
    from ltrain.config.load import load_config, parse_overrides

    return load_config(args.config, parse_overrides(overrides))


def _train(args: argparse.Namespace, overrides: list[str]) -> int:
    from ltrain.train.main import train

    return train(_config(args, overrides))


def _check(args: argparse.Namespace, overrides: list[str]) -> int:
    from ltrain.train.check import print_check

    return print_check(_config(args, overrides), args.world_size)


def _export(args: argparse.Namespace, overrides: list[str]) -> int:
    from ltrain.train.main import export

    return export(_config(args, overrides), args.out, args.step)


def _report(args: argparse.Namespace, overrides: list[str]) -> int:
    from ltrain.report.write import print_report

    _none(overrides)
    if args.elimination is not None:
        from ltrain.report.elimination import write_study

        print(write_study(args.elimination, args.page))
        return 0
    if not args.runs:
        raise ConfigError("RUN", "(missing)", "must be given", "name the folder of a run, outputs/NAME")
    return print_report(args.runs, args.out)


def _eval(args: argparse.Namespace, overrides: list[str]) -> int:
    from ltrain.eval.command import run

    _none(overrides)
    return run(args)


def _generate(args: argparse.Namespace, overrides: list[str]) -> int:
    from ltrain.generation.command import run

    _none(overrides)
    return run(args)


def _env(args: argparse.Namespace, overrides: list[str]) -> int:
    from ltrain.metrics.environment import print_environment

    _none(overrides)
    return print_environment()


def _plan(args: argparse.Namespace, overrides: list[str]) -> int:
    from ltrain.config.load import parse_yaml
    from ltrain.planner.command import run

    _none(overrides)
    return run(
        cluster_path=args.cluster,
        cost=parse_yaml(args.cost, "--cost"),
        lengths_path=args.lengths,
        mix_name=args.mix,
        num_sequences=args.num_sequences,
        max_length=args.max_length,
        seed=args.seed,
        out_png=args.png,
        out_json=args.json,
    )


def _bench(args: argparse.Namespace, rest: list[str]) -> int:
    script = BENCHMARKS / f"{args.name.replace('-', '_')}.py"
    if not script.is_file():
        known = ", ".join(sorted(p.stem.replace("_", "-") for p in BENCHMARKS.glob("*.py")))
        raise ConfigError(
            "bench", args.name, "is not a benchmark of this checkout", f"known here: {known or 'none'}"
        )
    return subprocess.run([sys.executable, str(script), *rest]).returncode


def _rendezvous(args: argparse.Namespace, overrides: list[str]) -> int:
    from ltrain.sync import serve
    from ltrain.train.plan import run_folder

    config = _config(args, overrides)
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    serve(config.sync, log_path=folder / "rounds.jsonl").wait()
    return 0


def _submit(args: argparse.Namespace, overrides: list[str]) -> int:
    from ltrain.submit import Nodes, parse_group, submit

    groups = [parse_group(text) for text in args.group] or [Nodes(args.nodes, args.gpus_per_node)]
    settings = {name: getattr(args, name) for name in ("time", "partition", "account")}
    config = _config(args, overrides)
    return submit(config, groups, dry_run=args.dry_run, settings=settings, template=args.template)


def _none(overrides: list[str]) -> None:
    if overrides:
        raise ConfigError("command line", " ".join(overrides), "is not known to this command")


def _calibrate(args: argparse.Namespace, options: list[str]) -> int:
    from ltrain.attention.calibrate import main as calibrate

    return calibrate(options)


def _fit_predictor(args: argparse.Namespace, overrides: list[str]) -> int:
    from ltrain.elimination.fit import FitSettings
    from ltrain.train.elimination import fit_predictor

    settings = FitSettings(args.learning_rate, args.prune_every)
    return fit_predictor(_config(args, overrides), steps=args.steps, out=args.out, settings=settings)


def _calibrate_elimination(args: argparse.Namespace, overrides: list[str]) -> int:
    from ltrain.train.calibrate_elimination import calibrate

    targets = {"target_bytes": args.target_bytes, "target_flops": args.target_flops}
    return calibrate(_config(args, overrides), rows=args.rows, out=args.out, **targets)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from ltrain.eval.settings import add_options
    from ltrain.generation.command import add_options as add_generate_options

    top = argparse.ArgumentParser(
        prog="ltrain",
        description="Extend the context of a pretrained language model.",
        epilog="Fields of the configuration are overridden by --section.field VALUE after CONFIG.",
    )
    top.add_argument("--version", action="version", version=f"ltrain {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str, *, config: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=run)
        if config:
            command.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
        return command

    add("train", _train, "Train; under torchrun on all its ranks, alone otherwise.")
    check = add("check", _check, "Say what a run would do, and whether it can, without starting it.")
    check.add_argument("--world-size", type=int, default=1, help="number of ranks to plan for")
    text = "Check, render and submit a run as a SLURM job; --dry-run stops before sbatch."
    job = add("submit", _submit, text)
    job.add_argument("--nodes", type=int, default=1, help="like nodes (default: 1)")
    job.add_argument("--gpus-per-node", type=int, default=8, help="0: one CPU process a node (default: 8)")
    help_text = "instead: a group of nodes, given twice for two kinds of hardware in one job"
    job.add_argument(
        "--group", action="append", default=[], metavar="NODES:GPUS[:CONSTRAINT]", help=help_text
    )
    job.add_argument("--time", default="24:00:00", help="time limit (default: 24:00:00)")
    job.add_argument("--partition", default=None)
    job.add_argument("--account", default=None)
    job.add_argument("--template", type=Path, default=None, help="job script (default: of slurm/)")
    job.add_argument("--dry-run", action="store_true", help="write script and configuration only")
    export = add("export", _export, "Write a checkpoint of a run as a Hugging Face folder.")
    export.add_argument("--out", type=Path, default=None, help="folder to write (default: RUN/hf)")
    export.add_argument("--step", type=int, default=None, help="step of the checkpoint (default: the newest)")
    text = "Evaluate a model folder at several lengths: retrieval, tracing, aggregation, QA, perplexity."
    add_options(add("eval", _eval, text, config=False))
    text = "Continue prompts greedily, with a cache that holds what the model's attention pattern sees."
    add_generate_options(add("generate", _generate, text, config=False))
    text = "Write report.html and plots of one run, or of several beside one another."
    report = add("report", _report, text, config=False)
    report.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folder of a run, outputs/NAME")
    report.add_argument(
        "--elimination", type=Path, metavar="DIR", help="report the study of elimination_quality.py instead"
    )
    report.add_argument("--page", type=Path, help="with --elimination: Markdown page to put the table into")
    report.add_argument("--out", type=Path, default=None, help="folder to write to (default: the first RUN)")
    text = "Run a benchmark of tools/bench, with its own options (--help shows them)."
    bench = add("bench", _bench, text, config=False)
    bench.add_argument(
        "name", help="attention, context-parallel, trainer, planner, patterns, loss-memory, ..."
    )
    text = "Deal one batch of documents to sequence-parallel groups, beside what rival assignments give."
    plan = add("plan", _plan, text, config=False)
    plan.add_argument("--cluster", type=Path, required=True, help="YAML or JSON profile of devices and links")
    plan.add_argument(
        "--cost", required=True, help="fields of the cost model: '{attention_s: ..., linear_s: ...}'"
    )
    batch = plan.add_mutually_exclusive_group(required=True)
    batch.add_argument("--lengths", type=Path, help="file of document lengths: a JSON list or one a line")
    batch.add_argument("--mix", help="built-in length mix: github, commoncrawl or wikipedia")
    plan.add_argument("--num-sequences", type=int, default=512, help="documents drawn from the mix")
    plan.add_argument("--max-length", type=int, default=None, help="cut lengths of the mix at this")
    plan.add_argument("--seed", type=int, default=0, help="seed of the draw")
    plan.add_argument("--png", type=Path, default=None, help="picture of the plan over time")
    plan.add_argument("--json", type=Path, default=None, help="the plan as JSON")
    add(
        "sync-rendezvous",
        _rendezvous,
        "Serve the meeting point of a run's replicas (section sync); keeps OUTPUT/NAME/rounds.jsonl.",
    )
    add("env", _env, "Versions, devices and which kernels are usable and why not.", config=False)
    text = "Measure links and kernels for the choice of schedule; under torchrun on all ranks."
    add("calibrate", _calibrate, text, config=False)
    text = "Train the learned block scorer of a run's model, which stays frozen."
    fit = add("fit-predictor", _fit_predictor, text)
    fit.add_argument("--steps", type=_positive, default=400, help="rows to train on")
    fit.add_argument("--out", type=Path, default=None, help="folder (default: elimination.scorer.path)")
    fit.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW, after 20 warm-up steps")
    fit.add_argument("--prune-every", type=_positive, default=100, help="steps between prunings")
    text = "Find each layer's elimination ratio for a budget: least rise of the loss per byte or FLOP."
    ratios = add("calibrate-elimination", _calibrate_elimination, text)
    ratios.add_argument("--target-bytes", type=float, help="share of the dense run's saved activation bytes")
    ratios.add_argument("--target-flops", type=float, help="share of the dense run's FLOPs")
    ratios.add_argument("--rows", type=_positive, default=8, help="rows of data to measure on")
    ratios.add_argument("--out", type=Path, default=Path("ratios.json"), help="file for elimination.ratio")
    return top


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    args, rest = parser().parse_known_args(arguments)
    # mcore and torch tell at import what is optional and at run time what they will rename; none of it is for
    # users.
    for module in ("megatron", "torch"):
        warnings.filterwarnings("ignore", module=rf"{module}\.")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("ltrain").setLevel(logging.INFO)
    try:
        return int(args.run(args, rest))
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"ltrain: {line}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
