"""JSON Lines: every record is a document."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ltrain.config.data import Jsonl
from ltrain.data.sources.record import BadRecord, usable


def files(source: Jsonl) -> list[Path]:
    """The file, or the folder's `*.jsonl` by name."""
    return [source.path] if source.path.is_file() else sorted(source.path.glob("*.jsonl"))


def read(source: Jsonl, path: Path) -> Iterator[tuple[str, str | BadRecord]]:
    """The text of every line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _text(line, source.field)


def _text(line: bytes, field: str) -> str | BadRecord:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return BadRecord("is not valid JSON")
    if not isinstance(record, dict) or field not in record:
        return BadRecord(f"has no field {field!r}")
    return usable(record[field])
