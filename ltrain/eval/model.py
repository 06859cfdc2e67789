"""A model in a Hugging Face folder: loss of given tokens, greedy generation, and caches that are shared.

With dense attention it runs as `transformers` runs it, else under its pattern (`ltrain.generation`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltrain.data.tokenizer import Tokenizer, load_tokenizer
from ltrain.generation.loading import load_sparse, load_transformers
from ltrain.generation.model import SparseModel
from ltrain.model.attention_file import TrainedAttention

CHUNK_TOKENS = 2048


def plain_tokens(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """The function from a text to its token ids, without begin and end."""

    def tokens(text: str) -> list[int]:
        ids = tokenizer.encode(text)
        start = 0 if tokenizer.bos_id is None else 1
        end = len(ids) - (0 if tokenizer.eos_id is None else 1)
        return [int(i) for i in ids[start:end]]

    return tokens


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
        return plain_tokens(self.tokenizer)(text)

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
                prefix = self.step(best, prefix)
        return self.tokenizer.decode(ids)

    def step(self, token: int, prefix: Prefix) -> Prefix:
        """Read a token that was generated, after `prefix` (which is used up)."""
        return self.read([token], prefix)

    def cache_bytes(self, prefix: Prefix) -> tuple[int, int] | None:
        """Bytes of a prefix's cache, and of a dense one; None where the model's kind of cache is unknown."""
        layers = getattr(prefix.cache, "layers", None)
        if layers is None:
            return None
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        return held, held


class SparseEvalModel(EvalModel):
    """A model that attends by its pattern. A text is read at once, since patterns look at all of it."""

    def __init__(self, sparse: SparseModel, tokenizer: Tokenizer, chunk_tokens: int = CHUNK_TOKENS) -> None:
        super().__init__(sparse.model, tokenizer, chunk_tokens)
        self.sparse = sparse

    def _hidden(self, ids: list[int], prefix: Prefix | None, *, search: bool) -> tuple[Tensor, Any]:
        cache = self.sparse.new_cache() if prefix is None else prefix.cache
        return self.sparse.hidden(torch.tensor([ids]), [cache], search=search)[0], cache

    @torch.no_grad()
    def read(self, ids: list[int], prefix: Prefix | None = None, *, search: bool = True) -> Prefix:
        """As for any model; `search`: the tokens are a prompt, from which the pattern is found anew."""
        if not ids:
            return super().read(ids, prefix)
        hidden, cache = self._hidden(ids, prefix, search=search)
        return Prefix(cache, self.sparse.logits(hidden[-1]), cache.length)

    def losses(self, ids: list[int], prefix: Prefix | None = None) -> Tensor:
        return self.scored(ids, prefix)[0]

    @torch.no_grad()
    def scored(self, ids: list[int], prefix: Prefix | None = None) -> tuple[Tensor, list[int]]:
        """`losses`, and the likeliest token in each one's place."""
        if not ids:
            return torch.zeros(0), []
        # After a prefix the tokens are an answer: decoded, not searched.
        hidden, _ = self._hidden(ids, prefix, search=prefix is None)
        targets = torch.tensor(ids if prefix is not None else ids[1:], device=self.device)
        first = [] if prefix is None else [prefix.logits[None]]
        found, best, at = [], [], 0
        for start in range(0, len(ids), self.chunk_tokens):
            # Each chunk's last row predicts the next chunk's first token.
            rows = self.sparse.logits(hidden[start : start + self.chunk_tokens])
            logits = torch.cat([*first, rows])[: len(targets) - at]
            wanted = targets[at : at + len(logits)]
            found.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
            best += logits.argmax(-1).tolist()
            first, at = [], at + len(wanted)
        return torch.cat(found).cpu(), best

    def step(self, token: int, prefix: Prefix) -> Prefix:
        return self.read([token], prefix, search=False)

    def cache_bytes(self, prefix: Prefix) -> tuple[int, int] | None:
        return prefix.cache.nbytes, self.sparse.dense_bytes(prefix.num_tokens)


def _may_break(token: int, newline: Iterable[int], tokenizer: Tokenizer) -> bool:
    """Whether a token may hold a line break; decoding everything at every token would cost its square."""
    return token in newline or "\n" in tokenizer.decode([token])


def load_model(
    folder: Path, *, device: str = "auto", dtype: str = "auto", attention: TrainedAttention | None = None
) -> EvalModel:
    """Load a model and its tokenizer from a folder, as `load_transformers` does.

    `attention` is what the model attends, dense by default. Raises ConfigError where the folder holds no such
    model.
    """
    if attention is not None and attention.pattern.kind != "dense":
        return SparseEvalModel(*load_sparse(folder, attention, device=device, dtype=dtype))
    return EvalModel(load_transformers(folder, device=device, dtype=dtype), load_tokenizer(str(folder)))
