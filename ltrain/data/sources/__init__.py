"""Documents as text; one module a kind of source, each with `files(source)` and `read(source, path)`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from ltrain.config.base import ConfigError
from ltrain.config.data import TextSource
from ltrain.data.sources import jsonl, parquet, text_tree
from ltrain.data.sources.record import BadRecord

READERS: dict[str, ModuleType] = {"text_tree": text_tree, "jsonl": jsonl, "parquet": parquet}


def source_files(source: TextSource) -> list[Path]:
    """The files of a source in a fixed order. Raises ConfigError where there are none."""
    if str(source.path) != "stdlib" and not source.path.exists():
        raise ConfigError("data.sources.path", str(source.path), "does not exist", "check the path")
    found: list[Path] = READERS[source.kind].files(source)
    if not found:
        raise ConfigError(
            "data.sources.path", str(source.path), "holds no file that matches", "check path and glob"
        )
    return found


def texts(source: TextSource, files: list[Path]) -> Iterator[tuple[str, str | BadRecord]]:
    """(name, text or what is wrong with it) of every document, in the order of `files`."""
    for path in files:
        try:
            yield from READERS[source.kind].read(source, path)
        except OSError as error:
            yield str(path), BadRecord(f"cannot be read: {error.strerror or error}")
