"""Sources to token stores: once, by one process, kept in a cache."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.config.data import SourceConfig, TextSource, TokenShards
from ltrain.data.sources import source_files, texts
from ltrain.data.sources.record import BadRecord
from ltrain.data.store import SHARD_TOKENS, VERSION, TokenStore, write_store
from ltrain.data.tokenizer import Tokenizer

log = logging.getLogger("ltrain")

_BATCH_CHARACTERS = 1 << 22
_NAMED_BAD_FILES = 5


def tokenise(
    source: TextSource, tokenizer: Tokenizer, folder: Path, *, shard_tokens: int = SHARD_TOKENS
) -> dict[str, Any]:
    """Write a source as a token store. Returns its facts; `left_out` counts what held no text.

    Raises ConfigError where nothing is usable, or at the first bad record where the source refuses them.
    """
    facts: dict[str, Any] = {"source": str(source.path), "left_out": 0}
    documents = _documents(source, source_files(source), tokenizer, facts)
    facts = write_store(folder, documents, tokenizer, facts=facts, shard_tokens=shard_tokens)
    log.info(
        "tokenised %s: %d documents, %d tokens, %d left out",
        source.path,
        facts["documents"],
        facts["tokens"],
        facts["left_out"],
    )
    return facts


def _documents(
    source: TextSource, files: list[Path], tokenizer: Tokenizer, facts: dict[str, Any]
) -> Iterator[tuple[int, np.ndarray]]:
    def encode(batch: list[tuple[str, str]]) -> Iterator[tuple[int, np.ndarray]]:
        encoded = tokenizer.encode_batch([text for _, text in batch])
        for (name, text), tokens in zip(batch, encoded, strict=True):
            if len(tokens):
                yield text_hash(text), tokens
            else:
                leave_out(name, "has no token")

    def leave_out(name: str, reason: str) -> None:
        if source.on_bad_file == "refuse":
            raise ConfigError("data.sources", name, reason, "mend or remove it, or set on_bad_file: skip")
        facts["left_out"] += 1
        if facts["left_out"] <= _NAMED_BAD_FILES:
            log.warning("left out: %s %s", name, reason)

    batch: list[tuple[str, str]] = []
    size = 0
    for name, text in texts(source, files):
        if isinstance(text, BadRecord):
            leave_out(name, text)
            continue
        batch.append((name, text))
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield from encode(batch)
            batch, size = [], 0
    yield from encode(batch)


def text_hash(text: str) -> int:
    """64 bits of the text's hash; equal texts have equal hashes whatever the tokenizer and source."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def cache_key(source: TextSource, tokenizer: Tokenizer) -> str:
    """A name that changes with the files (names, sizes, times of change), the tokenizer, and what is read."""
    read = source.model_dump(mode="json", exclude={"weight", "min_tokens", "max_tokens"})
    digest = hashlib.sha256(json.dumps([VERSION, tokenizer.fingerprint, read]).encode())
    for path in source_files(source):
        stat = os.stat(path)
        digest.update(f"{path}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def open_source(source: SourceConfig, tokenizer: Tokenizer, cache: Path) -> TokenStore:
    """The tokenised documents of a source, made on first use and kept in `cache`.

    Of several processes that ask for the same source one writes it and the others wait.
    """
    if isinstance(source, TokenShards):
        store = TokenStore(source.path)
    else:
        folder = cache / "tokens" / cache_key(source, tokenizer)
        store = _whole_store(folder)
        if store is None:
            try:
                with _lock(folder):
                    store = _whole_store(folder) or _tokenise_anew(source, tokenizer, folder)
            except OSError as error:
                raise ConfigError(
                    "data.cache", str(cache), f"cannot be written: {error.strerror}", "name another folder"
                ) from None
    store.check_tokenizer(tokenizer)
    return store


def _whole_store(folder: Path) -> TokenStore | None:
    """The cached store; None where there is none, or a damaged one."""
    try:
        return TokenStore(folder) if folder.is_dir() else None
    except ConfigError:
        return None


def _tokenise_anew(source: TextSource, tokenizer: Tokenizer, folder: Path) -> TokenStore:
    """Write the cached store, under its lock, in place of what killed or damaged writes left there."""
    if folder.is_dir():
        log.warning("the data cache %s is damaged and is made again", folder)
        shutil.rmtree(folder)
    for left_by_a_killed_process in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left_by_a_killed_process)
    tokenise(source, tokenizer, folder)
    return TokenStore(folder)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock file; the system frees it when the process ends, however it ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
