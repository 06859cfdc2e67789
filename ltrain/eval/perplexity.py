"""Loss of text by position in the document and by document length, through a sliding window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ltrain.config.base import ConfigError
from ltrain.config.data import DataConfig, TextTree
from ltrain.data.corpus import open_corpus
from ltrain.data.tokenizer import Tokenizer


class Losses(Protocol):
    """A model that gives the loss (nats) of every token of a text but the first, fp32 [T - 1], on the CPU."""

    def losses(self, ids: list[int]) -> Tensor: ...


@dataclass
class Sums:
    """Loss (nats) and targets, added up by bucket; keys are upper ends (exclusive)."""

    loss: dict[int, float]
    targets: dict[int, int]

    def add(self, end: int, losses: Tensor) -> None:
        if len(losses):
            self.loss[end] = self.loss.get(end, 0.0) + float(losses.double().sum())
            self.targets[end] = self.targets.get(end, 0) + len(losses)

    def means(self) -> dict[int, float]:
        return {end: self.loss[end] / self.targets[end] for end in sorted(self.loss)}


def bucket_end(value: int) -> int:
    """The power of two, 128 at least, that is the smallest above `value`."""
    return max(128, 1 << value.bit_length())


def window_losses(model: Losses, tokens: Sequence[int], window: int) -> Tensor:
    """Loss of every token of a document but the first, fp32 [T - 1]; no token sees more than `window` back.

    Windows overlap by half: behind the first window every target has between half a window and a window of
    context.
    """
    if len(tokens) <= window:
        return model.losses(list(tokens))
    stride = window // 2
    found = [model.losses(list(tokens[:window]))]
    done = window
    while done < len(tokens):
        end = min(done + stride, len(tokens))
        losses = model.losses(list(tokens[max(0, end - window) : end]))
        found.append(losses[-(end - done) :])
        done = end
    return torch.cat(found)


def perplexity(model: Losses, documents: Sequence[Sequence[int]], window: int) -> dict[str, Any]:
    """Loss over the documents with a window of `window` tokens: mean, by position of the token that predicts,
    and by length of its document.
    """
    by_position, by_length, whole = Sums({}, {}), Sums({}, {}), Sums({}, {})
    for tokens in documents:
        losses = window_losses(model, tokens, window)
        whole.add(0, losses)
        by_length.add(bucket_end(len(tokens)), losses)
        start = 0
        while start < len(losses):
            end = bucket_end(start)
            by_position.add(end, losses[start:end])
            start = end
    loss = whole.means()[0]
    return {
        "window": window,
        "documents": len(documents),
        "targets": whole.targets[0],
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "by_position": by_position.means(),
        "targets_by_position": by_position.targets,
        "by_document_length": by_length.means(),
        "targets_by_document_length": by_length.targets,
    }


def held_out_documents(
    source: TextTree, tokenizer: Tokenizer, *, holdout: float, cache: Any, max_tokens: int
) -> list[np.ndarray]:
    """Documents that training with `data.holdout` of `holdout` on this text does not see, by hash, of at most
    `max_tokens` in all (or one document); every document where `holdout` is 0.
    """
    config = DataConfig(sources=(source,), tokenizer=tokenizer.name, holdout=holdout, cache=cache)
    corpus = open_corpus(config, tokenizer)
    entries = corpus.held_out if holdout else corpus.train
    found: list[np.ndarray] = []
    used = 0
    for entry in entries:
        tokens = corpus.tokens(entry)
        if len(tokens) < 2:
            continue
        if found and used + len(tokens) > max_tokens:
            break
        found.append(tokens)
        used += len(tokens)
    if not found:
        rule = "gives no held-out document"
        raise ConfigError("--text", str(source.path), rule, "raise --holdout, or use 0 for every document")
    return found
