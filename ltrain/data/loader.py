"""The stream of steps: the same on every rank, resumable at any step, independent of the layout."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.config.data import DataConfig
from ltrain.data.packing import Packer, split_document
from ltrain.data.rows import Row
from ltrain.data.shards import TokenStore, open_source
from ltrain.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Step:
    """The rows of one step, over all ranks, and the `data/` metrics."""

    rows: list[Row]
    stats: dict[str, float]


@dataclass(frozen=True)
class Corpus:
    """Documents of all sources. `train` and `held_out` int64 [n, 2] hold (source, document); a document of a
    source with weight w stands w times (rounded at random) in `train` of an epoch.
    """

    stores: list[TokenStore]
    weights: list[float]
    train: np.ndarray
    held_out: np.ndarray
    fingerprint: str

    def tokens(self, entry: np.ndarray) -> np.ndarray:
        return self.stores[int(entry[0])][int(entry[1])]


def open_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Open, filter and split the sources. Raises ConfigError where nothing is left to train on."""
    stores = [open_source(source, tokenizer, config.cache) for source in config.sources]
    train, held_out = [], []
    digest = hashlib.sha256()
    for s, (source, store) in enumerate(zip(config.sources, stores, strict=True)):
        digest.update(store.lengths.tobytes() + json.dumps(store.facts, sort_keys=True).encode())
        fits = store.lengths >= max(source.min_tokens, 1)
        if source.max_tokens is not None:
            fits &= store.lengths <= source.max_tokens
        ids = np.flatnonzero(fits)
        # Multiplicative hashing of the document's number: the split does not depend on filters or order.
        mixed = ((ids.astype(np.uint64) + 1) * np.uint64(11400714819323198485)) >> np.uint64(40)
        held = mixed.astype(np.float64) / (1 << 24) < config.holdout
        pairs = np.stack([np.full(len(ids), s), ids], axis=1)
        train.append(pairs[~held])
        held_out.append(pairs[held])
    corpus = Corpus(
        stores,
        [s.weight for s in config.sources],
        np.concatenate(train),
        np.concatenate(held_out),
        digest.hexdigest(),
    )
    if not len(corpus.train):
        raise ConfigError(
            "data.sources", len(stores), "hold no document to train on", "check the length filters"
        )
    return corpus


class Loader:
    """Yields the steps of a run. State is seed, epoch, document cursor and the packer's open rows."""

    def __init__(
        self, config: DataConfig, corpus: Corpus, *, seq_len: int, tokens_per_step: int, seed: int
    ) -> None:
        self.config, self.corpus, self.seq_len, self.seed = config, corpus, seq_len, seed
        self.rows_per_step = tokens_per_step // seq_len
        self.tokens_per_step = tokens_per_step
        self.longest = min(config.max_document_tokens or seq_len, seq_len)
        self.packer = Packer(config.packing, seq_len, config.document_mask)
        self.epoch, self.cursor, self.dropped_tokens = 0, 0, 0
        self._ready: deque[Row] = deque()
        self._order = self._permute()

    def _permute(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, self.epoch])
        train = self.corpus.train
        weights = np.asarray(self.corpus.weights)[train[:, 0]]
        copies = np.floor(weights + rng.random(len(train))).astype(np.int64)
        picked = np.repeat(np.arange(len(train)), copies)
        if not len(picked):
            raise ConfigError("data.sources.weight", self.corpus.weights, "leave no document in an epoch")
        return rng.permutation(picked)

    def _next_document(self) -> np.ndarray:
        if self.cursor >= len(self._order):
            self.epoch, self.cursor = self.epoch + 1, 0
            self._order = self._permute()
        entry = self.corpus.train[self._order[self.cursor]]
        self.cursor += 1
        return self.corpus.tokens(entry)

    def _enough(self) -> bool:
        if self.config.packing == "none":
            return sum(row.num_tokens for row in self._ready) >= self.tokens_per_step
        return len(self._ready) >= self.rows_per_step

    def next_step(self) -> Step:
        """The next step's rows: a fixed number of full rows, or with `packing: none` documents of about as
        many tokens.
        """
        while not self._enough():
            pieces, dropped = split_document(self._next_document(), self.longest, self.config.long_documents)
            self.dropped_tokens += dropped
            for piece in pieces:
                self._ready.extend(self.packer.push(piece))
        rows: list[Row] = []
        if self.config.packing == "none":
            total = 0
            while self._ready and (not rows or total + self._ready[0].num_tokens <= self.tokens_per_step):
                total += self._ready[0].num_tokens
                rows.append(self._ready.popleft())
        else:
            rows = [self._ready.popleft() for _ in range(self.rows_per_step)]
        return Step(rows, self._stats(rows))

    def _stats(self, rows: list[Row]) -> dict[str, float]:
        lengths = np.concatenate([row.document_lengths for row in rows])
        size = sum(len(row.tokens) for row in rows)
        fill = float(lengths.sum()) / size
        return {
            "data/pack_fill": fill,
            "data/pad_frac": 1 - fill,
            "data/doc_len_p50": float(np.median(lengths)),
            "data/doc_len_max": float(lengths.max()),
            "data/truncated_tokens": float(self.dropped_tokens),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "cursor": self.cursor,
            "dropped_tokens": self.dropped_tokens,
            "packer": self.packer.state_dict(),
            "ready": [[row.tokens.tolist(), list(row.document_lengths)] for row in self._ready],
            "data": self.corpus.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ConfigError where the data has changed since."""
        if state["data"] != self.corpus.fingerprint:
            raise ConfigError(
                "data.sources",
                self.corpus.fingerprint[:12],
                f"is other data than the checkpoint's ({state['data'][:12]})",
                "restore the files, or start from the checkpoint's parameters with checkpoint.init_from",
            )
        self.seed, self.epoch, self.cursor = state["seed"], state["epoch"], state["cursor"]
        self.dropped_tokens = state["dropped_tokens"]
        self.packer.load_state_dict(state["packer"])
        self._ready = deque(
            Row(np.asarray(tokens, dtype=np.int32), tuple(lengths), self.config.document_mask)
            for tokens, lengths in state["ready"]
        )
        self._order = self._permute()


def held_out_rows(
    config: DataConfig, corpus: Corpus, *, seq_len: int, max_tokens: int, min_tokens: int
) -> list[Row]:
    """Held-out documents in a fixed order, packed into rows, cut at the context, of about `max_tokens` in
    all.
    """
    packer = Packer("first_fit", seq_len, True)
    rows: list[Row] = []
    used = 0
    for entry in corpus.held_out:
        tokens = corpus.tokens(entry)[:seq_len]
        if len(tokens) < max(2, min_tokens):
            continue
        if used and used + len(tokens) > max_tokens:
            break
        rows += packer.push(tokens)
        used += len(tokens)
    return rows + packer.flush()
