"""The documents of all sources: filtered, split into train and held-out, ordered for an epoch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.config.data import DataConfig
from ltrain.data.packing import Packer, Pieces
from ltrain.data.rows import Piece, Row
from ltrain.data.store import TokenStore
from ltrain.data.tokenise import open_source
from ltrain.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Corpus:
    """Documents of all sources. `train` and `held_out` int64 [n, 2] hold (source, document).

    `fingerprint` changes with any token of any source, used or not.
    """

    stores: tuple[TokenStore, ...]
    weights: tuple[float, ...]
    train: np.ndarray
    held_out: np.ndarray
    fingerprint: str

    def tokens(self, entry: np.ndarray) -> np.ndarray:
        """The document of a row of `train` or `held_out`, int32."""
        return self.stores[int(entry[0])][int(entry[1])]

    def piece(self, entry: np.ndarray) -> Piece:
        """A reference to the whole document of a row of `train` or `held_out`."""
        source, document = int(entry[0]), int(entry[1])
        return Piece(source, document, 0, int(self.stores[source].lengths[document]))

    def lengths(self, entries: np.ndarray) -> np.ndarray:
        """Lengths in tokens, int64 [n], of rows of `train` or `held_out`."""
        found = np.zeros(len(entries), dtype=np.int64)
        for s, store in enumerate(self.stores):
            of_source = entries[:, 0] == s
            found[of_source] = store.lengths[entries[of_source, 1]]
        return found

    def row(self, pieces: Pieces, length: int, document_mask: bool) -> Row:
        """Read the tokens of a row of `length` tokens."""
        tokens = np.zeros(length, dtype=np.int32)
        at = 0
        for piece in pieces:
            read = self.stores[piece.source].read(piece.document, piece.start, piece.length)
            tokens[at : at + piece.length] = read
            at += piece.length
        return Row(tokens, tuple(p.length for p in pieces), document_mask, pieces=pieces)

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """Rows of `train` in the order of an epoch, int64.

        A source of weight w gives every document floor(w) times, and once more as many documents, drawn at
        random, as make the source's share exact over the epochs.
        """
        rng = np.random.default_rng([seed, epoch])
        chosen = []
        for s, weight in enumerate(self.weights):
            rows = np.flatnonzero(self.train[:, 0] == s)
            whole, rest = divmod(weight, 1.0)
            extra = int((epoch + 1) * rest * len(rows)) - int(epoch * rest * len(rows))
            chosen.append(np.tile(rows, int(whole)))
            chosen.append(rng.choice(rows, size=extra, replace=False))
        return rng.permutation(np.concatenate(chosen))

    def histogram(self) -> list[tuple[int, int, int]]:
        """(upper length, documents, tokens) of training documents, by powers of two."""
        lengths = self.lengths(self.train)
        powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
        counts, sums = np.bincount(powers), np.bincount(powers, weights=lengths)
        found = zip(range(len(counts)), counts, sums, strict=True)
        return [(1 << power, int(count), int(total)) for power, count, total in found if count]


def open_corpus(config: DataConfig, tokenizer: Tokenizer) -> Corpus:
    """Open, filter and split the sources. Raises ConfigError where a source gives nothing to train on."""
    stores = tuple(open_source(source, tokenizer, config.cache) for source in config.sources)
    train, held_out, hashes = [], [], []
    for s, (source, store) in enumerate(zip(config.sources, stores, strict=True)):
        fits = store.lengths >= max(source.min_tokens, 1)
        if source.max_tokens is not None:
            fits &= store.lengths <= source.max_tokens
        ids = np.flatnonzero(fits)
        # 32 bits of the text's hash as a number from 0 to 1; copies of a text fall on the same side.
        held = (store.hashes[ids] >> np.uint64(32)).astype(np.float64) / (1 << 32) < config.holdout
        pairs = np.stack([np.full(len(ids), s), ids], axis=1)
        if held.all():
            raise ConfigError(
                f"data.sources[{s}]",
                str(source.path),
                f"has no document to train on: of {len(store)} documents of {store.lengths.min()} to "
                f"{store.lengths.max()} tokens {len(ids)} pass the length filters, "
                f"{held.sum()} are held out",
                "check min_tokens, max_tokens and data.holdout",
            )
        train.append(pairs[~held])
        held_out.append(pairs[held])
        hashes.append(store.hashes[ids[held]])
    # By hash, so that the first held-out documents are a sample of all sources.
    order = np.argsort(np.concatenate(hashes), kind="stable")
    return Corpus(
        stores,
        tuple(source.weight for source in config.sources),
        np.concatenate(train),
        np.concatenate(held_out)[order],
        hashlib.sha256("".join(store.fingerprint for store in stores).encode()).hexdigest(),
    )


def held_out_rows(
    config: DataConfig, corpus: Corpus, *, seq_len: int, max_tokens: int, min_tokens: int
) -> list[Row]:
    """Held-out documents of at least `min_tokens` tokens in a fixed order, packed into rows of `seq_len`, cut
    at the context, of at most `max_tokens` in all (or one document).

    Documents are always masked from one another, so that loss by position means position in the document.
    """
    packer = Packer("first_fit", seq_len)
    rows: list[Pieces] = []
    used = 0
    for entry in corpus.held_out:
        piece = corpus.piece(entry)
        if piece.length < max(2, min_tokens):
            continue
        piece = piece._replace(length=min(piece.length, seq_len))
        if max_tokens <= 0 or (used and used + piece.length > max_tokens):
            break
        rows += packer.push(piece)
        used += piece.length
    return [corpus.row(pieces, seq_len, True) for pieces in rows + packer.flush()]
