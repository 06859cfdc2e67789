"""Tokenised documents on disk: one file of tokens, one of document offsets, one of facts; read by memory map."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.config.data import SourceConfig, TokenShards
from ltrain.data.sources import BadRecord, source_files, texts
from ltrain.data.tokenizer import Tokenizer

log = logging.getLogger("ltrain")

VERSION = 1


class TokenStore:
    """Documents of token ids, memory-mapped. `store[i]` is document i, int32; `lengths` int64 are all
    lengths.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
            dtype = np.dtype(self.facts["dtype"])
            offsets = np.load(folder / "offsets.npy", allow_pickle=False)
            size = (folder / "tokens.bin").stat().st_size
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError("data.sources.path", str(folder), f"is not a token store: {error}") from None
        expected = int(offsets[-1]) * dtype.itemsize
        if size != expected:
            raise ConfigError(
                "data.sources.path",
                str(folder / "tokens.bin"),
                f"has {size} bytes and must have {expected}",
                "it was cut off or changed: write it again",
            )
        self._offsets = offsets
        self._tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r") if size else np.empty(0, dtype)
        self.lengths = np.diff(offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.asarray(self._tokens[self._offsets[i] : self._offsets[i + 1]], dtype=np.int32)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise ConfigError where the documents were made with another tokenizer."""
        if self.facts["tokenizer"] != tokenizer.fingerprint:
            raise ConfigError(
                "data.tokenizer",
                tokenizer.name,
                f"has fingerprint {tokenizer.fingerprint}, the data in {self.folder} was made with "
                f"{self.facts['tokenizer']}",
                "use the tokenizer of the data or pack the data again",
            )


def write_store(folder: Path, source: SourceConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Tokenise a source into a new folder, atomically. Returns the store's facts. Raises ConfigError."""
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir(parents=True)
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    offsets, bad = [0], 0
    with (temporary / "tokens.bin").open("wb") as file:
        for name, text in texts(source):
            if isinstance(text, BadRecord):
                if source.on_bad_file == "refuse":
                    raise ConfigError("data.sources", name, str(text), "mend it, or set on_bad_file: skip")
                bad += 1
                continue
            ids = tokenizer.encode(text)
            file.write(ids.astype(dtype).tobytes())
            offsets.append(offsets[-1] + len(ids))
    if len(offsets) == 1:
        raise ConfigError("data.sources.path", str(source.path), f"holds no usable document ({bad} left out)")
    np.save(temporary / "offsets.npy", np.asarray(offsets, dtype=np.int64))
    facts = {
        "version": VERSION,
        "dtype": dtype.name,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "documents": len(offsets) - 1,
        "tokens": offsets[-1],
        "left_out": bad,
    }
    (temporary / "facts.json").write_text(json.dumps(facts))
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.rename(folder)
    except OSError:  # another process wrote the same store meanwhile
        if not folder.is_dir():
            raise
    return facts


def cache_key(source: SourceConfig, tokenizer: Tokenizer) -> str:
    """A name that changes with the files, the tokenizer and what is read of them."""
    digest = hashlib.sha256(f"{VERSION} {tokenizer.fingerprint} {source.model_dump_json()}".encode())
    for path in source_files(source):
        stat = os.stat(path)
        digest.update(f"{path}|{stat.st_size}|{stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def open_source(source: SourceConfig, tokenizer: Tokenizer, cache: Path) -> TokenStore:
    """The tokenised documents of a source, made on first use and kept in `cache`."""
    if isinstance(source, TokenShards):
        store = TokenStore(source.path)
    else:
        folder = cache / "tokens" / cache_key(source, tokenizer)
        if not folder.is_dir():
            facts = write_store(folder, source, tokenizer)
            log.info("tokenised %s: %s", source.path, facts)
        store = TokenStore(folder)
    store.check_tokenizer(tokenizer)
    return store
