"""Documents as text, from folders, JSON Lines and Parquet."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ltrain.config.base import ConfigError
from ltrain.config.data import Jsonl, Parquet, SourceConfig, TextTree


def source_files(source: SourceConfig) -> list[Path]:
    """The files of a source in a fixed order. Raises ConfigError where there are none."""
    path = source.path
    if isinstance(source, TextTree):
        if str(path) == "stdlib":
            path = Path(sysconfig.get_paths()["stdlib"])
        skip = {"site-packages", "__pycache__", "dist-packages"}
        found = [
            p for p in path.glob(source.glob) if p.is_file() and not skip & set(p.relative_to(path).parts)
        ]
    elif path.is_file():
        found = [path]
    else:
        found = list(path.glob("*.jsonl" if isinstance(source, Jsonl) else "*.parquet"))
    if not found:
        raise ConfigError(
            "data.sources.path", str(source.path), "holds no file that matches", "check path and glob"
        )
    return sorted(found)


class BadRecord(Exception):
    """A file or record that holds no text."""


def texts(source: SourceConfig) -> Iterator[tuple[str, str | BadRecord]]:
    """(name, text or what is wrong with it) of every document."""
    for path in source_files(source):
        if isinstance(source, TextTree):
            yield str(path), _text(path.read_bytes())
        elif isinstance(source, Jsonl):
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", _record(line, source.field)
        elif isinstance(source, Parquet):
            yield from _parquet(path, source.field)


def _text(data: bytes) -> str | BadRecord:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRecord(f"is not UTF-8 at byte {error.start}")
    return text if text.strip() else BadRecord("is empty")


def _record(line: bytes, field: str) -> str | BadRecord:
    try:
        record = json.loads(line)
    except ValueError:
        return BadRecord("is not valid JSON")
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        return BadRecord(f"has no text in field {field!r}")
    return text if text.strip() else BadRecord("is empty")


def _parquet(path: Path, field: str) -> Iterator[tuple[str, str | BadRecord]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except (pyarrow.ArrowInvalid, OSError) as error:
        yield str(path), BadRecord(f"is not a Parquet file: {str(error).splitlines()[0]}")
        return
    if field not in names:
        raise ConfigError(
            "data.sources.field", field, f"must be one of {path.name}'s columns: {', '.join(names)}"
        )
    number = 0
    for batch in file.iter_batches(columns=[field]):
        for value in batch.column(0):
            text = value.as_py()
            number += 1
            good = isinstance(text, str) and text.strip()
            yield f"{path}:{number}", text if good else BadRecord("is empty")
