"""Parquet: every row is a document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ltrain.config.base import ConfigError
from ltrain.config.data import Parquet
from ltrain.data.sources.record import BadRecord, usable


def files(source: Parquet) -> list[Path]:
    """The file, or the folder's `*.parquet` by name."""
    return [source.path] if source.path.is_file() else sorted(source.path.glob("*.parquet"))


def read(source: Parquet, path: Path) -> Iterator[tuple[str, str | BadRecord]]:
    """The text column, a batch of rows at a time. Raises ConfigError where the file has no such column."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if source.field not in columns:
                raise ConfigError(
                    "data.sources.field",
                    source.field,
                    f"must be a column of {path}",
                    f"use one of {', '.join(columns)}",
                )
            for batch in file.iter_batches(columns=[source.field], batch_size=1024):
                for value in batch.column(0):
                    number += 1
                    yield f"{path}:{number}", usable(value.as_py())
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        yield str(path), BadRecord(f"is not readable Parquet after row {number}: {reason}")
