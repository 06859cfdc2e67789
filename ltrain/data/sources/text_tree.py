"""A folder of text: every file is a document."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ltrain.config.base import ConfigError
from ltrain.config.data import TextTree
from ltrain.data.sources.record import BadRecord, usable

ALWAYS_EXCLUDED = frozenset({"__pycache__", "site-packages", "dist-packages"})


def files(source: TextTree) -> list[Path]:
    """Matching files, ordered by their path below the folder, so that the order is the same everywhere."""
    stdlib = str(source.path) == "stdlib"
    root = Path(sysconfig.get_paths()["stdlib"]) if stdlib else source.path
    pattern = source.glob or ("**/*.py" if stdlib else "**/*")
    if not root.is_dir():
        raise ConfigError("data.sources.path", str(source.path), "must be a folder", "name the folder above")
    excluded = ALWAYS_EXCLUDED.union(source.exclude)
    try:
        matches = [(p.relative_to(root).parts, p) for p in root.glob(pattern)]
    except (ValueError, NotImplementedError) as error:
        raise ConfigError("data.sources.glob", pattern, f"is no pattern: {error}") from None
    kept = [
        (parts, path)
        for parts, path in matches
        if not any(part in excluded or part.startswith(".") for part in parts) and path.is_file()
    ]
    return [path for _, path in sorted(kept)]


def read(source: TextTree, path: Path) -> Iterator[tuple[str, str | BadRecord]]:
    """The file as one document."""
    data = path.read_bytes()
    if b"\0" in data:
        yield str(path), BadRecord(f"is not text: byte 0 at offset {data.index(0)}")
        return
    try:
        yield str(path), usable(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        yield str(path), BadRecord(f"is not UTF-8 at offset {error.start}")
