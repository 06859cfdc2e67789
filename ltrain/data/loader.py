"""The stream of steps: the same on every rank, resumable at any step, independent of the layout."""

from __future__ import annotations

import itertools
import logging
import sys
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.config.data import DataConfig
from ltrain.data.corpus import Corpus, held_out_rows, open_corpus
from ltrain.data.packing import Packer, Pieces, split_document
from ltrain.data.rows import Piece, Row

__all__ = ["Corpus", "Loader", "Step", "held_out_rows", "open_corpus"]

log = logging.getLogger("ltrain")


@dataclass(frozen=True)
class Step:
    """The rows of one step, over all ranks, and the `data/` metrics."""

    rows: list[Row]
    stats: dict[str, float]


class Loader:
    """Yields the steps of a run.

    `next_step` gives `tokens_per_step // seq_len` rows of `seq_len` tokens, or, with `packing: none`,
    documents of at most `tokens_per_step` tokens in all. A thread reads the next `prefetch` steps meanwhile;
    the state is always that after the last step given out: seed, epoch, document cursor, open rows (as
    references to documents), settings and fingerprint of the data, all plain JSON.

    Raises ConfigError where the settings contradict the data.
    """

    def __init__(
        self,
        config: DataConfig,
        corpus: Corpus,
        *,
        seq_len: int,
        tokens_per_step: int,
        seed: int,
        prefetch: int = 1,
    ) -> None:
        if tokens_per_step % seq_len:
            lower = tokens_per_step // seq_len * seq_len
            raise ConfigError(
                "train.tokens_per_step",
                tokens_per_step,
                f"must be a multiple of train.seq_len={seq_len}",
                f"use {lower} or {lower + seq_len}" if lower else f"use {seq_len}",
            )
        self.config, self.corpus, self.seq_len, self.seed = config, corpus, seq_len, seed
        self.tokens_per_step = tokens_per_step
        self.longest = min(config.max_document_tokens or seq_len, seq_len)
        # One stream is cut where rows end; cutting long documents before would only add borders.
        streamed = config.packing == "concat_split" and config.long_documents == "split"
        self._cut = config.max_document_tokens or sys.maxsize if streamed else self.longest
        if config.long_documents == "drop" and corpus.lengths(corpus.train).min() > self.longest:
            raise ConfigError(
                "data.long_documents",
                "drop",
                f"drops every document: the shortest is longer than {self.longest} tokens",
                "use split, or a longer train.seq_len",
            )
        self._packer = Packer(config.packing, seq_len)
        self._epoch, self._cursor, self._dropped_tokens, self._split_documents = 0, 0, 0, 0
        self._ready: deque[Pieces] = deque()
        self._order = corpus.epoch_order(seed, 0)
        self._state = self._snapshot()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="data") if prefetch else None
        self._prefetch = prefetch
        self._pending: deque[Future[tuple[Step, dict[str, Any]]]] = deque()
        for store in corpus.stores:
            facts = store.facts
            log.info(
                "data %s: %d documents, %d tokens, %d bad files or records left out",
                facts["source"],
                facts["documents"],
                facts["tokens"],
                facts["left_out"],
            )
        for upper, documents, tokens in corpus.histogram():
            log.info("documents up to %7d tokens: %7d, %10d tokens", upper, documents, tokens)

    def next_step(self) -> Step:
        """The next step; of `data/` metrics `truncated_tokens` and `split_documents` count from the start."""
        step, self._state = self._pending.popleft().result() if self._pending else self._produce()
        while self._thread and len(self._pending) < self._prefetch:
            self._pending.append(self._thread.submit(self._produce))
        return step

    def upcoming(self) -> list[Step]:
        """The steps that have been read already and come next, in order."""
        done = itertools.takewhile(lambda f: f.done() and f.exception() is None, list(self._pending))
        return [future.result()[0] for future in done]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the last step given out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ConfigError where data or settings have changed since."""
        for future in self._pending:
            future.exception()  # the thread is done with the fields that change below
        self._pending.clear()
        other = "or start from the checkpoint's parameters with checkpoint.init_from"
        if state["data"] != self.corpus.fingerprint:
            raise ConfigError(
                "data.sources",
                self.corpus.fingerprint[:12],
                f"is other data than the checkpoint's ({state['data'][:12]})",
                f"restore the files, {other}",
            )
        for field, now in self._settings().items():
            then = state["settings"][field]
            if now != then:
                raise ConfigError(
                    field, now, f"must be {then!r}, as it was for the checkpoint", f"set it back, {other}"
                )
        self._epoch, self._cursor = state["epoch"], state["cursor"]
        self._dropped_tokens, self._split_documents = state["dropped_tokens"], state["split_documents"]
        self._packer.load_state_dict(state["packer"])
        self._ready = deque(tuple(Piece(*piece) for piece in row) for row in state["ready"])
        self._order = self.corpus.epoch_order(self.seed, self._epoch)
        self._state = self._snapshot()

    def _settings(self) -> dict[str, Any]:
        """What the order and the cuts of the stream depend on, by the name of its field."""
        sources, config = self.config.sources, self.config
        return {
            "run.seed": self.seed,
            "train.seq_len": self.seq_len,
            "data.packing": config.packing,
            "data.long_documents": config.long_documents,
            "data.max_document_tokens": config.max_document_tokens,
            "data.holdout": config.holdout,
            "data.sources.weight": [s.weight for s in sources],
            "data.sources.min_tokens": [s.min_tokens for s in sources],
            "data.sources.max_tokens": [s.max_tokens for s in sources],
        }

    def _snapshot(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "cursor": self._cursor,
            "dropped_tokens": self._dropped_tokens,
            "split_documents": self._split_documents,
            "packer": self._packer.state_dict(),
            "ready": [[list(piece) for piece in row] for row in self._ready],
            "settings": self._settings(),
            "data": self.corpus.fingerprint,
        }

    def _produce(self) -> tuple[Step, dict[str, Any]]:
        """The next step, and the state after it."""
        while not self._enough():
            document = self._next_document()
            pieces, dropped = split_document(document, self._cut, self.config.long_documents)
            self._dropped_tokens += dropped
            self._split_documents += document.length > self.longest and not dropped
            for piece in pieces:
                self._ready.extend(self._packer.push(piece))
        taken = self._take()
        none = self.config.packing == "none"
        rows = [
            self.corpus.row(pieces, _length(pieces) if none else self.seq_len, self.config.document_mask)
            for pieces in taken
        ]
        return Step(rows, self._stats(rows)), self._snapshot()

    def _next_document(self) -> Piece:
        while self._cursor >= len(self._order):  # an epoch of small weights may be empty
            self._epoch, self._cursor = self._epoch + 1, 0
            self._order = self.corpus.epoch_order(self.seed, self._epoch)
        self._cursor += 1
        return self.corpus.piece(self.corpus.train[self._order[self._cursor - 1]])

    def _enough(self) -> bool:
        if self.config.packing == "none":
            return sum(map(_length, self._ready)) >= self.tokens_per_step
        return len(self._ready) * self.seq_len >= self.tokens_per_step

    def _take(self) -> list[Pieces]:
        if self.config.packing != "none":
            return [self._ready.popleft() for _ in range(self.tokens_per_step // self.seq_len)]
        taken: list[Pieces] = []
        room = self.tokens_per_step
        while self._ready and _length(self._ready[0]) <= room:
            room -= _length(self._ready[0])
            taken.append(self._ready.popleft())
        return taken

    def _stats(self, rows: list[Row]) -> dict[str, float]:
        lengths = np.concatenate([row.document_lengths for row in rows])
        fill = float(lengths.sum()) / sum(len(row.tokens) for row in rows)
        return {
            "data/pack_fill": fill,
            "data/pad_frac": 1 - fill,
            "data/doc_len_p50": float(np.median(lengths)),
            "data/doc_len_max": float(lengths.max()),
            "data/truncated_tokens": float(self._dropped_tokens),
            "data/split_documents": float(self._split_documents),
            "data/epoch": float(self._epoch),
        }


def _length(pieces: Pieces) -> int:
    return sum(piece.length for piece in pieces)
