"""Which attention a folder's model runs with: as it was trained, dense, or another pattern for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ltrain.attention import patterns
from ltrain.config.base import ConfigError
from ltrain.config.load import parse_yaml
from ltrain.model.attention_file import TrainedAttention, parse_attention, read_attention
from ltrain.model.pattern_weights import check_stored

OPTION = "--attention"


def choose_attention(folder: Path, choice: str = "trained", block: int | None = None) -> TrainedAttention:
    """`trained` (what `ltrain.json` says), `dense`, or a pattern as YAML, `{kind: s2, stride: 8}`.

    `block` takes the place of the trained block. Raises ConfigError, also where the pattern needs weights of
    its own that the folder doesn't hold.
    """
    trained = read_attention(folder)
    tree: dict[str, Any] = trained.model_dump(mode="json")
    if block is not None:
        tree["block"] = block
    if choice != "trained":
        tree["pattern"] = _pattern(choice)
    chosen = parse_attention(tree, OPTION)
    check_stored(folder, patterns.from_config(chosen.pattern))
    return chosen


def _pattern(choice: str) -> dict[str, Any]:
    if choice == "dense":
        return {"kind": "dense"}
    found = parse_yaml(choice, OPTION)
    if not isinstance(found, dict):
        fix = "for example '{kind: s2, local_blocks: 16, stride: 8}'"
        raise ConfigError(OPTION, choice, "must be trained, dense or a pattern as YAML", fix)
    return found
