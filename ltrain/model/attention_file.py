"""`ltrain.json` beside an exported config.json: what the model was trained to attend.

`transformers` knows nothing of it and loads the folder with dense attention; `ltrain eval` and `ltrain
generate` read it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import PositiveInt, ValidationError

from ltrain.config.base import ConfigError, Section
from ltrain.config.patterns import DenseFields, PatternConfig, PatternFields

NAME = "ltrain.json"
SCHEMA_VERSION = 1


class TrainedAttention(Section):
    """The pattern that the model was trained with, and the tokens of a block that it counts in."""

    pattern: PatternConfig = DenseFields()
    """Which keys a query attends."""
    block: PositiveInt = 128
    """Tokens of a block."""

    def file(self) -> dict[str, Any]:
        """What `ltrain.json` holds."""
        return {"schema": SCHEMA_VERSION, "attention": self.model_dump(mode="json")}


def trained_attention(pattern: PatternFields, block: int) -> TrainedAttention:
    """The pattern of a run, in blocks of `block` tokens."""
    return parse_attention({"pattern": pattern.model_dump(mode="json"), "block": block}, "attention")


def parse_attention(tree: Any, source: str) -> TrainedAttention:
    """`{pattern: {kind: ...}, block: ...}` checked. Raises ConfigError; `source` names where it is from."""
    try:
        return TrainedAttention.model_validate(tree)
    except ValidationError as error:
        item = error.errors()[0]
        cause = (item.get("ctx") or {}).get("error")
        if isinstance(cause, ConfigError):
            raise ConfigError(f"{source}: {cause.field}", cause.value, cause.rule, cause.fix) from None
        field = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Input should be ")
        rule = f"must be {message}" if message != item["msg"] else message[0].lower() + message[1:]
        raise ConfigError(f"{source}: {field}", item.get("input"), rule) from None


def read_attention(folder: Path) -> TrainedAttention:
    """The attention of a model folder; dense where it has no `ltrain.json`. Raises ConfigError."""
    path = Path(folder) / NAME
    if not path.exists():
        return TrainedAttention()
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("MODEL", str(path), f"cannot be read: {error}", "export the model again") from None
    if not isinstance(tree, dict) or tree.get("schema") != SCHEMA_VERSION:
        found = tree.get("schema") if isinstance(tree, dict) else type(tree).__name__
        rule = f"must have schema {SCHEMA_VERSION}, it has {found}"
        raise ConfigError("MODEL", str(path), rule, "export the model again with this version")
    return parse_attention(tree.get("attention"), str(path))
