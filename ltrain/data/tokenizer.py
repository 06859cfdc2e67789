"""Text to token ids: bytes, or any Hugging Face tokenizer from a folder."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ltrain.config.base import ConfigError


class Tokenizer:
    """A tokenizer with the facts that data and checkpoints are bound to.

    `encode` returns int32 ids that start with the beginning-of-sequence token, where the tokenizer has one,
    and end with the end-of-sequence token. Text that looks like a special token stays text. `fingerprint`
    changes when any id, merge or rule of `encode` does. `vocab_size` is one more than the largest id.
    """

    def __init__(self, engine: Any, name: str) -> None:
        self._engine = engine
        self._backend = getattr(engine, "backend_tokenizer", None)
        self.name = name
        self.vocab_size = max(len(engine), max(engine.get_vocab().values()) + 1)
        self.bos_id: int | None = engine.bos_token_id
        self.eos_id: int | None = engine.eos_token_id

    @cached_property
    def fingerprint(self) -> str:
        if self._backend is None:
            facts = {"class": type(self._engine).__name__, "vocab": self._engine.get_vocab()}
        else:
            # What surrounds a single text (template, padding, truncation, decoding) has no part in `encode`.
            whole = json.loads(self._backend.to_str())
            facts = {key: whole.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
        facts["ends"] = [self.bos_id, self.eos_id]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of every text; fast tokenizers use all cores."""
        return [self._with_ends(ids) for ids in self._ids(texts)]

    def _ids(self, texts: Sequence[str]) -> Sequence[Any]:
        outcome = self._engine(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        found: Sequence[Any] = outcome["input_ids"]
        return found

    def _with_ends(self, ids: Any) -> np.ndarray:
        first = [] if self.bos_id is None else [self.bos_id]
        last = [] if self.eos_id is None else [self.eos_id]
        parts = [np.asarray(part, dtype=np.int32) for part in (first, ids, last)]
        return np.concatenate(parts)

    def decode(self, ids: Any) -> str:
        return str(self._engine.decode(list(map(int, ids)), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files in Hugging Face form."""
        self._engine.save_pretrained(str(folder))


class _ByteTokenizer(Tokenizer):
    """Token id = byte value, so that encoding needs no search; transformers serves to save it only."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.name, self.vocab_size = "byte", 258
        self.bos_id, self.eos_id = 256, 257

    @cached_property
    def _engine(self) -> Any:  # type: ignore[override]
        return _from_transformers("PreTrainedTokenizerFast")(
            tokenizer_object=self._backend,
            bos_token="<s>",
            eos_token="</s>",
            clean_up_tokenization_spaces=False,
        )

    def _ids(self, texts: Sequence[str]) -> Sequence[Any]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Any) -> str:
        return bytes(i for i in map(int, ids) if i < 256).decode(errors="replace")


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers, by byte value."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_tokenizer() -> Tokenizer:
    """Bytes (ids 0 to 255), `<s>` (256) and `</s>` (257), as an ordinary Hugging Face fast tokenizer."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(_byte_symbols())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return _ByteTokenizer(backend)


def _from_transformers(name: str) -> Any:
    """A class of transformers, which imports it, and what it needs, at this moment. Raises ConfigError that
    names the cause, which transformers' own message hides.
    """
    try:
        return getattr(importlib.import_module("transformers"), name)
    except (ImportError, AttributeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None or cause.__context__ is not None:
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        missing = cause.name if isinstance(cause, ModuleNotFoundError) and cause.name else None
        raise ConfigError(
            "data.tokenizer",
            f"transformers.{name}",
            f"cannot be imported: {_first_line(cause)}",
            f"pip install {missing}" if missing else "pip install --upgrade transformers tokenizers",
        ) from error


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def _is_plain(folder: Path) -> bool:
    """Whether the folder says that tokenizer.json is the whole tokenizer."""
    facts = folder / "tokenizer_config.json"
    generic = {"TokenizersBackend", "PreTrainedTokenizerFast"}
    return (
        (folder / "tokenizer.json").is_file()
        and facts.is_file()
        and json.loads(facts.read_text()).get("tokenizer_class") in generic
    )


def load_tokenizer(name: str) -> Tokenizer:
    """The built-in byte tokenizer, or the one in a Hugging Face folder. Raises ConfigError where there is
    none.
    """
    if name == "byte":
        return byte_tokenizer()
    folder = Path(name)
    if not folder.is_dir():
        raise ConfigError(
            "data.tokenizer", name, "must be `byte` or a folder with a tokenizer", "check the path"
        )
    try:
        # AutoTokenizer would put Qwen2's normalisation and words in place of a plain tokenizer.json's.
        maker = _from_transformers("PreTrainedTokenizerFast" if _is_plain(folder) else "AutoTokenizer")
        return Tokenizer(maker.from_pretrained(str(folder), local_files_only=True), name)
    except ConfigError:
        raise
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        raise ConfigError(
            "data.tokenizer",
            name,
            f"cannot be loaded: {_first_line(error)}",
            "check tokenizer.json in the folder",
        ) from None
