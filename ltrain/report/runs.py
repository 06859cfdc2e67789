"""What a run folder says: its configuration, its training records and its held-out evaluations."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ltrain.config.base import ConfigError
from ltrain.config.load import parse_yaml
from ltrain.metrics.sinks import SCHEMA_VERSION

Record = dict[str, Any]
BY_POSITION = "eval/loss_pos/"
TARGETS_BY_POSITION = "eval/targets_pos/"
LARGEST = 1e30


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss (nats a token) after `step` steps, in all and by the upper end of the position bucket.

    `targets` are the bucket's target tokens, where the run recorded them.
    """

    step: int
    loss: float
    by_position: dict[int, float]
    targets: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunLog:
    """One run folder, read and checked. `records` are in the order they were written."""

    folder: Path
    name: str
    config: dict[str, Any]
    records: list[Record]

    @cached_property
    def training(self) -> list[Record]:
        """Records of training steps."""
        return [record for record in self.records if "train/loss" in record]

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        return [_evaluation(record) for record in self.records if record.get("eval/loss") is not None]

    @cached_property
    def _tokens_at(self) -> tuple[list[int], list[float]]:
        known = {r["step"]: r["train/tokens"] for r in self.training if r.get("train/tokens") is not None}
        steps = sorted(known)
        return steps, [known[step] for step in steps]

    def tokens(self, step: int) -> float:
        """Tokens seen after `step` steps: of the last record up to it, 0 before the first."""
        steps, tokens = self._tokens_at
        i = bisect.bisect_right(steps, step)
        return tokens[i - 1] if i else 0.0

    def series(self, name: str, *, x: str = "tokens") -> tuple[list[float], list[float]]:
        """A metric over `tokens` or over `minutes` since the first record; steps without a value are left
        out.
        """
        points = [record for record in self.records if record.get(name) is not None]
        if x == "tokens":
            return [self.tokens(r["step"]) for r in points], [r[name] for r in points]
        began = self.records[0]["time"]
        return [(r["time"] - began) / 60 for r in points], [r[name] for r in points]

    def values(self, name: str, *, skip_first: bool = False) -> list[float]:
        """The metric's values; the first training record can be left out, since it holds warm-up costs."""
        found = [r for r in self.records if r.get(name) is not None]
        if skip_first and len(found) > 1:
            found = found[1:]
        return [r[name] for r in found]

    def family(self, prefix: str) -> list[str]:
        """Names that start with `prefix`, ordered by the number at their end."""
        names = {name for record in self.records for name in record if name.startswith(prefix)}
        return sorted(names, key=lambda name: (_trailing_number(name), name))

    def setting(self, path: str) -> Any:
        """A field of the configuration by its dotted name, None where absent."""
        node: Any = self.config
        for part in path.split("."):
            if not isinstance(node, dict):
                return None
            node = node.get(part)
        return node

    def _launch_folder(self) -> Path:
        """Where the run was started: relative paths in its configuration are meant from there."""
        end = Path(str(self.setting("run.output")), str(self.setting("run.name"))).parts
        here = self.folder.resolve()
        if not Path(*end).is_absolute() and here.parts[-len(end) :] == end:
            return Path(*here.parts[: -len(end)])
        return Path()

    @cached_property
    def base_context(self) -> int | None:
        """Context of the model that the run started from; None where its config.json can't be read now."""
        if self.setting("model.kind") != "hf":
            return _positive_int(self.setting("model.max_position_embeddings"))
        try:
            path = self._launch_folder() / str(self.setting("model.path")) / "config.json"
            return _positive_int(json.loads(path.read_text()).get("max_position_embeddings"))
        except (OSError, ValueError, AttributeError):
            return None


def read_run(folder: Path) -> RunLog:
    """Read `metrics.jsonl` and `config.yaml` of a run. Raises ConfigError where they are missing or damaged.

    A last line that a killed run left unfinished is no damage.
    """
    if not folder.is_dir():
        raise ConfigError("RUN", str(folder), "is not a folder", "name the folder of a run, outputs/NAME")
    config = parse_yaml(_text(folder / "config.yaml"), str(folder / "config.yaml"))
    if not isinstance(config, dict):
        raise ConfigError("config.yaml", str(folder / "config.yaml"), "must hold the sections of a run")
    records = list(_records(folder / "metrics.jsonl"))
    if not records:
        rule, fix = "holds no record yet", "report after the first logged step"
        raise ConfigError("metrics.jsonl", str(folder / "metrics.jsonl"), rule, fix)
    return RunLog(folder, folder.resolve().name, config, records)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        fix = "name the folder of a run, outputs/NAME"
        raise ConfigError(path.name, str(path), f"cannot be read: {reason}", fix) from None


def _records(path: Path) -> Iterator[Record]:
    lines = _text(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                return
            raise _damaged(path, number, "is not JSON") from None
        if not isinstance(record, dict):
            raise _damaged(path, number, "is not a JSON object")
        if "schema" in record:
            if record["schema"] != SCHEMA_VERSION:
                rule = f"is of schema {record['schema']!r}; this version reads schema {SCHEMA_VERSION}"
                raise _damaged(path, number, rule)
            continue
        yield _checked(record, path, number)


def _checked(record: Record, path: Path, number: int) -> Record:
    if isinstance(record.get("step"), bool) or not isinstance(record.get("step"), int):
        raise _damaged(path, number, "has no whole number `step`")
    for name, value in record.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise _damaged(path, number, f"has {name}={value!r}, which is not a number")
        if isinstance(value, int | float) and LARGEST < abs(value) < math.inf:
            raise _damaged(path, number, f"has {name} above {LARGEST:g}, which no metric reaches")
    values = {k: v if v is None or math.isfinite(v) else None for k, v in record.items()}
    if values.get("time") is None:
        raise _damaged(path, number, "has no `time`")
    return values


def _damaged(path: Path, number: int, rule: str) -> ConfigError:
    return ConfigError(path.name, f"{path}:{number}", rule, "the file is damaged; restore or remove the line")


def _evaluation(record: Record) -> Evaluation:
    def family(prefix: str) -> dict[int, float]:
        found = {
            int(name.removeprefix(prefix)): value
            for name, value in record.items()
            if name.startswith(prefix) and name.removeprefix(prefix).isdigit() and value is not None
        }
        return dict(sorted(found.items()))

    return Evaluation(record["step"], record["eval/loss"], family(BY_POSITION), family(TARGETS_BY_POSITION))


def _positive_int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _trailing_number(name: str) -> int:
    tail = name.rsplit("/", 1)[-1]
    return int(tail) if tail.isdigit() else 1 << 60
