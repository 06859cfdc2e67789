"""What the sources of a run hold, found without tokenising them: for a check before launch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ltrain.config.base import ConfigError
from ltrain.config.data import DataConfig, SourceConfig, TextSource, TokenShards
from ltrain.data.sources import READERS, source_files
from ltrain.data.sources.record import BadRecord
from ltrain.data.store import TokenStore
from ltrain.data.tokenise import cache_key
from ltrain.data.tokenizer import Tokenizer

READ_BYTES = 256 << 20
TOKENISE_BYTES = 4 << 20
VERIFY_BYTES = 4 << 30
_NAMED = 3


@dataclass(frozen=True)
class Survey:
    """What a source holds: `exact`, or scaled up from the share `read` and from the part that was tokenised.
    `bad` names files and records without text.
    """

    path: Path
    files: int
    documents: int
    tokens: int
    read: float
    exact: bool
    bad: tuple[str, ...]

    def describe(self) -> str:
        text = f"{self.path}: {'' if self.exact else 'about '}{self.tokens:,} tokens in "
        text += f"{self.documents:,} documents, {self.files:,} file{'s' * (self.files != 1)}"
        if self.read < 1.0:
            text += f" (from {100 * self.read:.2g} % of it)"
        if self.bad:
            named = ", ".join(self.bad[:_NAMED]) + (" and others" if len(self.bad) > _NAMED else "")
            text += f"; {len(self.bad):,} without text will be left out: {named}"
        return text


def survey(config: DataConfig, tokenizer: Tokenizer) -> list[Survey]:
    """Open every source. Raises ConfigError where one is missing, damaged, or holds nothing usable."""
    return [_survey(source, tokenizer, config.cache) for source in config.sources]


def _survey(source: SourceConfig, tokenizer: Tokenizer, cache: Path) -> Survey:
    if isinstance(source, TokenShards):
        return _of_store(TokenStore(source.path), source.path, tokenizer)
    folder = cache / "tokens" / cache_key(source, tokenizer)
    if folder.is_dir():
        try:
            return _of_store(TokenStore(folder), source.path, tokenizer)
        except ConfigError:
            pass  # a damaged cache is made again from the source
    return _of_text(source, tokenizer)


def _of_store(store: TokenStore, path: Path, tokenizer: Tokenizer) -> Survey:
    store.check_tokenizer(tokenizer)
    files = [store.folder / shard["file"] for shard in store.facts["shards"]]
    if sum(file.stat().st_size for file in files) <= VERIFY_BYTES:
        store.verify()
    return Survey(path, len(files), len(store), int(store.facts["tokens"]), 1.0, True, ())


def _of_text(source: TextSource, tokenizer: Tokenizer) -> Survey:
    """Read every file where they are of 256 MiB in all, an even sample otherwise; tokenise the first MiB."""
    files = source_files(source)
    sizes = [path.stat().st_size for path in files]
    bad = [f"{path} is empty" for path, size in zip(files, sizes, strict=True) if size == 0]
    full = [(path, size) for path, size in zip(files, sizes, strict=True) if size]
    total = sum(sizes)
    stride = max(1, -(-total // READ_BYTES)) if len(full) > 1 else 1
    read, documents, characters, tokenised, tokens = 0.0, 0, 0, 0, 0
    for path, size in full[::stride]:
        share, texts, wrong = _read(source, path, size)
        read += share * size
        documents += len(texts)
        characters += sum(map(len, texts))
        bad += wrong
        while texts and tokenised < TOKENISE_BYTES:
            batch, texts = texts[:256], texts[256:]
            tokenised += sum(map(len, batch))
            tokens += sum(map(len, tokenizer.encode_batch(batch)))
        if read >= READ_BYTES:
            break
    if bad and source.on_bad_file == "refuse":
        raise ConfigError(
            "data.sources", bad[0], "holds no text", "mend or remove it, or set on_bad_file: skip"
        )
    if not documents:
        rule = "holds no usable document" if read >= total else "holds no usable document in its first files"
        raise ConfigError("data.sources.path", str(source.path), f"{rule}: {'; '.join(bad[:_NAMED])}")
    share = min(1.0, read / total)
    tokens, documents = round(tokens * characters / tokenised / share), round(documents / share)
    exact = share == 1.0 and tokenised == characters
    return Survey(source.path, len(files), documents, tokens, share, exact, tuple(bad))


def _read(source: TextSource, path: Path, size: int) -> tuple[float, list[str], list[str]]:
    """The share of a file that was read, its texts, and what is wrong with other records."""
    texts, bad, seen = [], [], 0
    records = READERS[source.kind].read(source, path)
    try:
        for name, text in records:
            if isinstance(text, BadRecord):
                bad.append(f"{name} {text}")
                continue
            texts.append(text)
            # A line of JSON is longer than its text; other formats are as long, or are read to their end.
            seen += len(json.dumps(text)) if source.kind == "jsonl" else len(text)
            if seen >= READ_BYTES:
                break
    except OSError as error:
        bad.append(f"{path} cannot be read: {error.strerror or error}")
    ended = not list(islice(records, 1))
    return (1.0 if ended else min(1.0, seen / size)), texts, bad
