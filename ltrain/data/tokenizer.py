"""Text to token ids: bytes, or any Hugging Face tokenizer from a folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from ltrain.config.base import ConfigError


class Tokenizer:
    """A tokenizer with the facts that data and checkpoints are bound to.

    `encode` returns int32 ids that start with the beginning-of-sequence token, where the tokenizer has one,
    and end with the end-of-sequence token. `fingerprint` changes when any id or merge does.
    """

    def __init__(self, engine: Any, name: str) -> None:
        self._engine = engine
        self.name = name
        self.vocab_size = len(engine)
        self.bos_id: int | None = engine.bos_token_id
        self.eos_id: int | None = engine.eos_token_id

    @property
    def fingerprint(self) -> str:
        backend = getattr(self._engine, "backend_tokenizer", None)
        text = backend.to_str() if backend else json.dumps(self._engine.get_vocab(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        ids = self._engine.encode(text, add_special_tokens=False)
        first = [] if self.bos_id is None else [self.bos_id]
        last = [] if self.eos_id is None else [self.eos_id]
        return np.asarray([*first, *ids, *last], dtype=np.int32)

    def decode(self, ids: Any) -> str:
        return str(self._engine.decode(list(map(int, ids)), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files in Hugging Face form."""
        self._engine.save_pretrained(str(folder))


def byte_tokenizer() -> Tokenizer:
    """256 bytes and two special tokens, as an ordinary Hugging Face fast tokenizer."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    engine = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return Tokenizer(engine, "byte")


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
    from transformers import AutoTokenizer

    try:
        return Tokenizer(AutoTokenizer.from_pretrained(str(folder), local_files_only=True), name)
    except (OSError, ValueError) as error:
        raise ConfigError("data.tokenizer", name, f"cannot be loaded: {str(error).splitlines()[0]}") from None
