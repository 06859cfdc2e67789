"""Tokenised documents on disk, read by memory map.

A store is a folder of

    facts.json          version, dtype, tokenizer, vocab_size, documents, tokens, source, left_out,
                        index_sha256, shards
    offsets.npy         int64 [documents + 1], where document i begins, counted over all shards
    hashes.npy          uint64 [documents], a hash of each document's text
    tokens-00000.bin    little-endian uint16 or int32; no document lies in two shards
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.data.tokenizer import Tokenizer

VERSION = 2
SHARD_TOKENS = 1 << 28
_AGAIN = "it was cut off or changed: write it again"
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "int32": np.dtype("<i4")}


def _refuse(path: Path, rule: str, fix: str = _AGAIN) -> ConfigError:
    return ConfigError("data.sources.path", str(path), rule, fix)


def _index_sha256(offsets: np.ndarray, hashes: np.ndarray) -> str:
    return hashlib.sha256(offsets.tobytes() + hashes.tobytes()).hexdigest()


class TokenStore:
    """Documents of token ids, memory-mapped. `store[i]` is document i, int32, a copy; `lengths` int64 are all
    lengths, `hashes` uint64 the hashes of the texts.

    Raises ConfigError, with file and offset, where the folder is not a whole store, and when a document is
    read that holds an id outside the vocabulary. `fingerprint` changes with any token or border.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
            if self.facts["version"] != VERSION:
                raise _refuse(folder, f"has version {self.facts['version']}, not {VERSION}", "pack it again")
            self._dtype = _DTYPES[self.facts["dtype"]]
            self.vocab_size = int(self.facts["vocab_size"])
            shards = [(str(s["file"]), int(s["documents"]), int(s["tokens"])) for s in self.facts["shards"]]
            digests = [str(s["sha256"]) for s in self.facts["shards"]]
            index_sha256 = str(self.facts["index_sha256"])
        except OSError as error:
            raise _refuse(
                folder, f"is not a token store: {error.strerror}", "write one with tools/pack_dataset.py"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise _refuse(folder / "facts.json", f"is damaged: {type(error).__name__} {error}") from None
        self._offsets = self._load("offsets.npy", np.int64)
        self.hashes = self._load("hashes.npy", np.uint64)
        self.lengths = np.diff(self._offsets)
        if _index_sha256(self._offsets, self.hashes) != index_sha256:
            raise _refuse(folder / "offsets.npy", "does not have the checksum of facts.json")
        if sum(s[1] for s in shards) != len(self) or sum(s[2] for s in shards) != self._offsets[-1]:
            raise _refuse(folder / "facts.json", f"counts other shards than the {len(self)} documents need")
        self._shards = [self._map(file, tokens) for file, _, tokens in shards]
        self._first_document = np.cumsum([0] + [s[1] for s in shards])
        facts = json.dumps([self.facts["dtype"], index_sha256, digests])
        self.fingerprint = hashlib.sha256(facts.encode()).hexdigest()

    def _load(self, name: str, dtype: type) -> np.ndarray:
        try:
            found: np.ndarray = np.load(self.folder / name, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _refuse(self.folder / name, f"cannot be read: {str(error).splitlines()[0]}") from None
        if found.dtype != dtype or found.ndim != 1:
            raise _refuse(self.folder / name, f"must hold {np.dtype(dtype).name} [n]")
        return found

    def _map(self, file: str, tokens: int) -> np.ndarray:
        path = self.folder / file
        if Path(file).name != file:
            raise _refuse(self.folder / "facts.json", f"names the shard {file!r} outside the folder")
        size = path.stat().st_size if path.is_file() else 0
        expected = tokens * self._dtype.itemsize
        if size != expected:
            raise _refuse(path, f"ends at byte {size} and must end at byte {expected}")
        return np.memmap(path, dtype=self._dtype, mode="r")

    def __len__(self) -> int:
        return len(self.hashes)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.read(i, 0, int(self.lengths[i]))

    def read(self, i: int, start: int, length: int) -> np.ndarray:
        """`length` tokens of document i from its token `start` on, int32, a copy."""
        shard = int(np.searchsorted(self._first_document, i, side="right")) - 1
        begin = int(self._offsets[i] - self._offsets[self._first_document[shard]]) + start
        tokens = self._shards[shard][begin : begin + length].astype(np.int32)
        # As unsigned, a negative id is out of the vocabulary like one that is too large.
        wrong = tokens.view(np.uint32) >= self.vocab_size
        if wrong.any():
            at = int(wrong.argmax())
            raise ConfigError(
                "data.sources.path",
                str(self.folder / self.facts["shards"][shard]["file"]),
                f"holds token {tokens[at]} at byte {(begin + at) * self._dtype.itemsize}; "
                f"ids must be below {self.vocab_size}",
                _AGAIN,
            )
        return tokens

    def verify(self) -> None:
        """Read every shard and compare its checksum. Raises ConfigError."""
        for shard in self.facts["shards"]:
            with (self.folder / shard["file"]).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    raise _refuse(self.folder / shard["file"], "does not have the checksum of facts.json")

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


def write_store(
    folder: Path,
    documents: Iterable[tuple[int, np.ndarray]],
    tokenizer: Tokenizer,
    *,
    facts: dict[str, Any],
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Write (hash, tokens) pairs as a store, which appears whole or not at all. Returns its facts.

    `facts`, filled while `documents` runs, is added to the store's own. Raises ConfigError where there is no
    document, or one holds an id outside the tokenizer's vocabulary; OSError where the disk does.
    """
    dtype = _DTYPES["uint16" if tokenizer.vocab_size <= 1 << 16 else "int32"]
    offsets: list[int] = [0]
    hashes: list[int] = []
    with _new_folder(folder) as temporary:
        shards = _Shards(temporary, shard_tokens)
        for hashed, tokens in documents:
            if tokens.min() < 0 or tokens.max() >= tokenizer.vocab_size:
                raise ConfigError(
                    "data.tokenizer",
                    tokenizer.name,
                    f"gave token {tokens.max()} for document {len(hashes)}; "
                    f"ids must be below {tokenizer.vocab_size}",
                )
            shards.add(tokens.astype(dtype).tobytes(), len(tokens))
            offsets.append(offsets[-1] + len(tokens))
            hashes.append(hashed)
        shards.close()
        if not hashes:
            raise ConfigError(
                "data.sources.path", facts.get("source", str(folder)), f"holds no usable document; {facts}"
            )
        index = np.asarray(offsets, dtype=np.int64), np.asarray(hashes, dtype=np.uint64)
        for name, array in zip(("offsets.npy", "hashes.npy"), index, strict=True):
            with (temporary / name).open("wb") as file:
                np.save(file, array)
                _sync(file)
        whole = {
            "version": VERSION,
            "dtype": "uint16" if dtype.itemsize == 2 else "int32",
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "documents": len(hashes),
            "tokens": offsets[-1],
            **facts,
            "index_sha256": _index_sha256(*index),
            "shards": shards.facts,
        }
        with (temporary / "facts.json").open("wb") as file:
            file.write(json.dumps(whole, indent=1).encode())
            _sync(file)
    return whole


class _Shards:
    """Appends documents to files of about `limit` tokens."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.facts: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None

    def add(self, data: bytes, tokens: int) -> None:
        if self._file is not None and self.facts[-1]["tokens"] + tokens > self.limit:
            self.close()
        if self._file is None:
            name = f"tokens-{len(self.facts):05d}.bin"
            self.facts.append({"file": name, "documents": 0, "tokens": 0})
            self._file, self._digest = (self.folder / name).open("wb"), hashlib.sha256()
        self._file.write(data)
        self._digest.update(data)
        self.facts[-1]["documents"] += 1
        self.facts[-1]["tokens"] += tokens

    def close(self) -> None:
        if self._file is not None:
            self.facts[-1]["sha256"] = self._digest.hexdigest()
            _sync(self._file)
            self._file.close()
            self._file = None


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `folder` at the end and removed on any error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
