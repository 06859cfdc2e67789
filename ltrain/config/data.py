"""What to train on: the `data` section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ltrain.config.base import ConfigError, Section


class _Source(Section):
    weight: PositiveFloat = 1.0
    """Passes over this source for one pass over a source of weight 1."""
    min_tokens: NonNegativeInt = 0
    """Leave out documents shorter than this."""
    max_tokens: PositiveInt | None = None
    """Leave out documents longer than this."""

    @model_validator(mode="after")
    def _check_lengths(self) -> _Source:
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ConfigError(
                "data.sources.max_tokens", self.max_tokens, f"must be at least min_tokens={self.min_tokens}"
            )
        return self


class _TextSource(_Source):
    on_bad_file: Literal["skip", "refuse"] = "skip"
    """What to do with a file or record that is empty or cannot be decoded: leave it out and count it, or
    stop.
    """


class TextTree(_TextSource):
    kind: Literal["text_tree"] = "text_tree"
    path: Path
    """A folder: every file that matches is a document. `stdlib` is the running Python's standard library."""
    glob: str | None = None
    """Which files; where absent `**/*.py` of `stdlib`, and every file of another folder."""
    exclude: tuple[str, ...] = ()
    """Names of folders and files to leave out at any depth, such as `test`. Hidden ones, `__pycache__`,
    `site-packages` and `dist-packages` are always left out.
    """


class Jsonl(_TextSource):
    kind: Literal["jsonl"] = "jsonl"
    path: Path
    """A JSON Lines file, or a folder of `*.jsonl`: every record is a document."""
    field: str = "text"
    """Name of the record's text."""


class Parquet(_TextSource):
    kind: Literal["parquet"] = "parquet"
    path: Path
    """A Parquet file, or a folder of `*.parquet`: every row is a document."""
    field: str = "text"
    """Name of the text column."""


class TokenShards(_Source):
    kind: Literal["tokens"] = "tokens"
    path: Path
    """A folder that tools/pack_dataset.py wrote: memory-mapped tokens with document offsets."""


TextSource = TextTree | Jsonl | Parquet
SourceConfig = Annotated[TextTree | Jsonl | Parquet | TokenShards, Field(discriminator="kind")]


class DataConfig(Section):
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where documents come from."""
    tokenizer: str = "byte"
    """`byte` (built in), or the path of a Hugging Face tokenizer's folder."""
    packing: Literal["first_fit", "concat_split", "none"] = "first_fit"
    """How documents fill rows: whole into the first row with room, one stream cut at the row's end, or one
    document a row at its own length."""
    long_documents: Literal["split", "drop"] = "split"
    """What to do with a document longer than the row, or than `max_document_tokens`."""
    max_document_tokens: PositiveInt | None = None
    """Split or drop documents longer than this; the row's length where absent."""
    document_mask: bool = True
    """Attention and positions end at document borders."""
    holdout: float = Field(0.02, ge=0, lt=1)
    """Share of documents that is never trained on. A hash of the text decides, so copies of a document are on
    the same side.
    """
    cache: Path = Path(".cache/ltrain")
    """Folder for tokenised sources."""
