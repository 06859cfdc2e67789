"""The ratio of every layer, from the configuration or from what `ltrain calibrate-elimination` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ltrain.config.base import ConfigError
from ltrain.config.elimination import BlockElimination
from ltrain.elimination.quotas import check_ratio

FIELD = "elimination.ratio"
FILE_KIND = "ltrain elimination ratios"


def resolve_ratios(config: BlockElimination, num_layers: int) -> tuple[float, ...]:
    """One ratio a layer of the whole model. Raises ConfigError where they don't fit it."""
    if isinstance(config.ratio, str):
        return _read(Path(config.ratio.removeprefix("file:")), config, num_layers)
    if isinstance(config.ratio, tuple):
        return _checked(config.ratio, num_layers)
    for layer in config.dense_layers:
        if layer >= num_layers:
            rule = f"must lie in 0..{num_layers - 1}, the layers of the model"
            raise ConfigError("elimination.dense_layers", layer, rule)
    return tuple(1.0 if layer in config.dense_layers else config.ratio for layer in range(num_layers))


def write_ratios(path: Path, ratios: tuple[float, ...], facts: dict[str, Any]) -> None:
    """Write ratios, with how they were found, for `ratio: file:PATH`."""
    text = json.dumps({"kind": FILE_KIND, "ratios": list(ratios), **facts}, indent=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def _read(path: Path, config: BlockElimination, num_layers: int) -> tuple[float, ...]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(FIELD, f"file:{path}", f"cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("kind") != FILE_KIND:
        fix = "make it with ltrain calibrate-elimination"
        raise ConfigError(FIELD, f"file:{path}", "is not a file of elimination ratios", fix)
    if found.get("mode") not in (None, config.mode):
        rule = f"was calibrated for mode {found['mode']!r}, and the run's is {config.mode!r}"
        raise ConfigError(FIELD, f"file:{path}", rule, f"set elimination.mode to {found['mode']}")
    ratios = found.get("ratios")
    if not isinstance(ratios, list) or not all(type(r) in (int, float) for r in ratios):
        raise ConfigError(FIELD, f"file:{path}", "must hold a list of numbers, `ratios`")
    return _checked(tuple(float(r) for r in ratios), num_layers)


def _checked(ratios: tuple[float, ...], num_layers: int) -> tuple[float, ...]:
    if len(ratios) != num_layers:
        rule = f"must hold one number for each of the model's {num_layers} layers"
        raise ConfigError(FIELD, len(ratios), rule)
    for layer, ratio in enumerate(ratios):
        check_ratio(f"{FIELD}[{layer}]", ratio)
    return ratios
