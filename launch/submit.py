"""Submit a run to SLURM: launch/submit.py CONFIG --nodes 4 [--dry-run] [--sbatch "..."] [--section.field
VALUE ...]

Checks the configuration for the world size, writes the resolved configuration and the script beside the run's
logs, and calls sbatch. With --dry-run it prints the script instead.
"""

import argparse
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path

from ltrain.config.base import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def render(template: str, settings: dict[str, str], arguments: list[str]) -> str:
    """The template with its #SBATCH settings replaced or added, and its arguments fixed."""
    for name, value in settings.items():
        line = f"#SBATCH --{name}={value}"
        pattern = re.compile(rf"^#SBATCH --{re.escape(name)}(=.*)?$", re.MULTILINE)
        if pattern.search(template):
            template = pattern.sub(lambda _, line=line: line, template)
        else:
            template = template.replace("\n#SBATCH", f"\n{line}\n#SBATCH", 1)
    head, mark, rest = template.partition("set -euo pipefail\n")
    return f"{head}{mark}set -- {shlex.join(arguments)}\n{rest}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", type=Path)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--time", default="24:00:00")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--template", type=Path, default=ROOT / "slurm" / "train.sbatch")
    parser.add_argument("--dry-run", action="store_true")
    args, overrides = parser.parse_known_args()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        return submit(args, overrides)
    except ConfigError as error:
        print(f"ltrain: {error}", file=sys.stderr)
        return 2


def submit(args: argparse.Namespace, overrides: list[str]) -> int:
    """Check, render, and unless dry, submit."""
    from ltrain.config.load import load_config, parse_overrides
    from ltrain.train.plan import check_run, run_folder, write_config

    if args.nodes < 1:
        raise ConfigError("--nodes", args.nodes, "must be at least 1")
    config = load_config(args.config, parse_overrides(overrides))
    check_run(config, args.nodes * args.gpus_per_node)
    folder = run_folder(config)
    resolved = (folder / "config.yaml").resolve()
    settings = {
        "job-name": config.run.name,
        "nodes": str(args.nodes),
        "gpus-per-node": str(args.gpus_per_node),
        "time": args.time,
        "output": str(folder.resolve() / "slurm-%j.out"),
    }
    settings |= {k: v for k, v in (("partition", args.partition), ("account", args.account)) if v}
    script = render(args.template.read_text(), settings, [str(resolved)])
    if args.dry_run:
        print(script)
        return 0
    write_config(config, folder)
    path = folder / "job.sbatch"
    path.write_text(script)
    return subprocess.run(["sbatch", str(path)], env=None).returncode


if __name__ == "__main__":
    sys.exit(main())
