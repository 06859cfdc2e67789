"""Models whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from ltrain.data.tokenizer import byte_tokenizer
from ltrain.eval.model import EvalModel


class Cache(list):
    """The tokens read so far."""


class Scripted(nn.Module):
    """Continues text by a function of it: `following(text) -> text`; reads bytes through the cache."""

    def __init__(self, following, context: int = 4096) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.following = following
        self.config = SimpleNamespace(max_position_embeddings=context)
        self.num_read = 0

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep):
        cache = Cache(past_key_values or [])
        count = input_ids.shape[1]
        logits = torch.zeros(1, logits_to_keep or count, 258)
        self.num_read += count
        cache += input_ids[0].tolist()
        for i in range(logits.shape[1]):
            seen = cache[: len(cache) - (logits.shape[1] - 1 - i)]
            text = bytes(b for b in seen if b < 256).decode(errors="replace")
            rest = self.following(text).encode()
            logits[0, i, rest[0] if rest else 257] = 20.0
        return SimpleNamespace(past_key_values=cache, logits=logits)


def scripted(following, **arguments) -> EvalModel:
    return EvalModel(Scripted(following, **arguments), byte_tokenizer())


def answering(turns) -> EvalModel:
    """A model that knows the references of the turns."""

    def following(text: str) -> str:
        for turn in turns:
            start = text.rfind(turn.question)
            if start >= 0:
                rest = turn.reference + "\n"
                given = text[start + len(turn.question) :]
                if rest.startswith(given):
                    return rest[len(given) :]
        return ""

    return scripted(following)
