"""A model in a Hugging Face folder: loss of given tokens, greedy generation, and caches that are shared."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltrain.config.base import ConfigError
from ltrain.data.tokenizer import Tokenizer, load_tokenizer

CHUNK_TOKENS = 2048
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Prefix:
    """Tokens that the model has read: their cache, and the logits [V] after the last one."""

    def __init__(self, cache: Any, logits: Tensor, num_tokens: int) -> None:
        self.cache, self.logits, self.num_tokens = cache, logits, num_tokens

    def copy(self) -> Prefix:
        """A prefix to go on from while this one stays."""
        return Prefix(copy.deepcopy(self.cache), self.logits, self.num_tokens)


class EvalModel:
    """The model and its tokenizer. Long inputs are read in chunks, so that only a chunk's logits exist."""

    def __init__(self, model: Any, tokenizer: Tokenizer, chunk_tokens: int = CHUNK_TOKENS) -> None:
        self.model, self.tokenizer, self.chunk_tokens = model.eval(), tokenizer, chunk_tokens
        self.device = next(model.parameters()).device
        self.context: int | None = getattr(model.config, "max_position_embeddings", None)
        self._newline = self.tokens("\n")

    def tokens(self, text: str) -> list[int]:
        """Token ids of the text alone, without begin and end."""
        ids = self.tokenizer.encode(text)
        start = 0 if self.tokenizer.bos_id is None else 1
        end = len(ids) - (0 if self.tokenizer.eos_id is None else 1)
        return [int(i) for i in ids[start:end]]

    def _forward(self, ids: list[int], prefix: Prefix | None, keep: int) -> Any:
        batch = torch.tensor([ids], device=self.device)
        cache = None if prefix is None else prefix.cache
        return self.model(input_ids=batch, past_key_values=cache, use_cache=True, logits_to_keep=keep)

    @torch.no_grad()
    def read(self, ids: list[int], prefix: Prefix | None = None) -> Prefix:
        """Read tokens, after `prefix` (which is used up). Raises ValueError without any token."""
        if not ids:
            if prefix is None:
                raise ValueError("a prefix needs a token")
            return prefix
        for start in range(0, len(ids), self.chunk_tokens):
            chunk = ids[start : start + self.chunk_tokens]
            output = self._forward(chunk, prefix, keep=1)
            before = 0 if prefix is None else prefix.num_tokens
            prefix = Prefix(output.past_key_values, output.logits[0, -1].float(), before + len(chunk))
        assert prefix is not None
        return prefix

    @torch.no_grad()
    def losses(self, ids: list[int], prefix: Prefix | None = None) -> Tensor:
        """Loss (nats) of every token that has one before it, fp32 on the CPU: [len(ids)] after a prefix (it
        is used up), else [len(ids) - 1].
        """
        found = []
        logits = None if prefix is None else prefix.logits[None]
        for start in range(0, len(ids), self.chunk_tokens):
            chunk = ids[start : start + self.chunk_tokens]
            output = self._forward(chunk, prefix, keep=0)
            rows = output.logits[0].float()
            before = rows[:-1] if logits is None else torch.cat([logits, rows[:-1]])
            targets = torch.tensor(chunk[1:] if logits is None else chunk, device=self.device)
            found.append(torch.nn.functional.cross_entropy(before, targets, reduction="none").cpu())
            prefix = Prefix(output.past_key_values, rows[-1], 0)
            logits = rows[-1:]
        return torch.cat(found) if found else torch.zeros(0)

    @torch.no_grad()
    def generate(self, prefix: Prefix, max_tokens: int) -> str:
        """Greedy continuation of a prefix (which is used up), up to the end token, a line break after some
        text, or `max_tokens`.
        """
        ids: list[int] = []
        while len(ids) < max_tokens:
            best = int(prefix.logits.argmax())
            if best == self.tokenizer.eos_id:
                break
            ids.append(best)
            text = self.tokenizer.decode(ids) if _may_break(best, self._newline, self.tokenizer) else ""
            if "\n" in text.lstrip() and text.strip():
                return text.lstrip().split("\n")[0]
            if len(ids) < max_tokens:
                prefix = self.read([best], prefix)
        return self.tokenizer.decode(ids)


def _may_break(token: int, newline: Iterable[int], tokenizer: Tokenizer) -> bool:
    """Whether a token may hold a line break; decoding everything at every token would cost its square."""
    return token in newline or "\n" in tokenizer.decode([token])


def load_model(folder: Path, *, device: str = "auto", dtype: str = "auto") -> EvalModel:
    """Load a model and its tokenizer from a folder, without any network.

    `device` `auto` is the first GPU where there is one; `dtype` `auto` is the folder's own. Raises
    ConfigError where the folder holds no such model.
    """
    if not (folder / "config.json").is_file():
        rule = "is not a model folder: it has no config.json"
        raise ConfigError("MODEL", str(folder), rule, "name a folder that `ltrain export` or training wrote")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device", device, "is not there: no usable GPU", "use --device cpu")
    except RuntimeError:
        raise ConfigError("--device", device, "is no device", "use auto, cpu or cuda") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=DTYPES.get(dtype, "auto"), local_files_only=True
        )
    except Exception as error:  # damaged weights and unknown architectures raise all kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError("MODEL", str(folder), f"cannot be loaded: {reason}", "export it again") from None
    return EvalModel(model.to(place), load_tokenizer(str(folder)))
