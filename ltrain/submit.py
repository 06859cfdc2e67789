"""`ltrain submit`: a run as a SLURM job, checked, rendered beside its logs, and handed to sbatch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltrain.config.base import ConfigError
from ltrain.config.schema import RunConfig
from ltrain.train.plan import check_run, run_folder, write_config

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = {1: ROOT / "slurm" / "train.sbatch", 2: ROOT / "slurm" / "two_groups.sbatch"}
_GROUP = re.compile(r"^(\d+):(\d+)(?::([\w.,=-]+))?$")


@dataclass(frozen=True)
class Nodes:
    """A group of like nodes of a job; `constraint` is SLURM's name of a node feature."""

    nodes: int
    gpus_per_node: int
    constraint: str | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * max(1, self.gpus_per_node)


def parse_group(text: str) -> Nodes:
    """`NODES:GPUS[:CONSTRAINT]`. Raises ConfigError on anything else."""
    match = _GROUP.match(text)
    if match is None or int(match[1]) < 1:
        raise ConfigError("--group", text, "must be NODES:GPUS or NODES:GPUS:CONSTRAINT", "such as 2:8:h100")
    return Nodes(int(match[1]), int(match[2]), match[3])


def submit(
    config: RunConfig,
    groups: Sequence[Nodes],
    *,
    dry_run: bool,
    settings: dict[str, str | None],
    template: Path | None = None,
) -> int:
    """Write `launch/config.yaml` and `launch/job.sbatch` into the run's folder, where the job's log goes too,
    and unless dry, call sbatch with it.

    The configuration is checked for the world size of the groups. `settings` are further options of sbatch by
    name, of every group. Returns sbatch's exit code. Raises ConfigError where the input is wrong.
    """
    if not 1 <= len(groups) <= len(TEMPLATES):
        raise ConfigError("--group", len(groups), f"must be given at most {len(TEMPLATES)} times")
    for group in groups:
        if group.nodes < 1 or group.gpus_per_node < 0:
            raise ConfigError("--nodes", group.nodes, "must be at least 1, on GPUs that are not negative")
    check_run(config, sum(group.ranks for group in groups))
    source = template or TEMPLATES[len(groups)]
    try:
        text = source.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--template", str(source), f"cannot be read: {error}") from None
    folder = run_folder(config).resolve() / "launch"
    common = {name: value for name, value in settings.items() if value is not None}
    first = {"job-name": config.run.name, "output": str(folder / "slurm-%j.out")}
    parts = [
        first | _size(group) | common if i == 0 else _size(group) | common for i, group in enumerate(groups)
    ]
    script = render(text, parts, [str(folder / "config.yaml")])
    write_config(config, folder)
    path = folder / "job.sbatch"
    path.write_text(script)
    print(f"{path}\n{folder / 'config.yaml'}")
    if dry_run:
        return 0
    if shutil.which("sbatch") is None:
        raise ConfigError("sbatch", "(missing)", "is not on this machine", "use --dry-run, or a login node")
    return subprocess.run(["sbatch", f"--chdir={ROOT}", str(path)]).returncode


def _size(group: Nodes) -> dict[str, str | None]:
    return {
        "nodes": str(group.nodes),
        # Without GPUs there is one process a node, and SLURM must not be asked for any.
        "gpus-per-node": str(group.gpus_per_node) if group.gpus_per_node else None,
        "constraint": group.constraint,
    }


def render(template: str, parts: Sequence[dict[str, Any]], arguments: Sequence[str]) -> str:
    """The template with each part's #SBATCH settings replaced, added or (None) removed, and its arguments
    fixed. Parts are divided by `#SBATCH hetjob`.

    Raises ConfigError where the template has another number of parts.
    """
    head, mark, body = template.partition("set -euo pipefail\n")
    pieces = re.split(r"^#SBATCH hetjob\n", head, flags=re.MULTILINE)
    if len(pieces) != len(parts) or not mark:
        rule = f"must have {len(parts)} parts divided by `#SBATCH hetjob`, then `set -euo pipefail`"
        raise ConfigError("--template", f"{len(pieces)} parts", rule)
    pieces = [_with_settings(piece, settings) for piece, settings in zip(pieces, parts, strict=True)]
    return "#SBATCH hetjob\n".join(pieces) + f"{mark}set -- {shlex.join(arguments)}\n{body}"


def _with_settings(text: str, settings: dict[str, Any]) -> str:
    for name, value in settings.items():
        pattern = re.compile(rf"^#SBATCH --{re.escape(name)}(=.*)?\n", re.MULTILINE)
        line = "" if value is None else f"#SBATCH --{name}={value}\n"
        if pattern.search(text):
            text = pattern.sub(lambda _, line=line: line, text)
        else:
            text = text.rstrip("\n") + "\n" + line
    return text
