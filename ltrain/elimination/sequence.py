"""One packed sequence as elimination sees it, and the shorter sequence that its kept blocks make.

T tokens of the sequence, N blocks of `block` tokens in document order, K of them kept. All of it is
arithmetic on block numbers, equal on all ranks; only `rows_of` is about one rank's shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ltrain.attention.patterns.documents import Documents, documents_of
from ltrain.elimination.quotas import Deal, Quotas, plan_quotas
from ltrain.parallel.layout import SequenceLayout


@dataclass(frozen=True, eq=False)
class BlockedSequence:
    """The blocks of a sequence, who holds them, and the documents that they belong to.

    `layout` deals blocks of elimination, `per_deal` of which make a block of the run's layout. `padding` says
    that the last document is padding. `targets` bool [N] marks blocks that hold targets, or is None.
    """

    layout: SequenceLayout
    documents: Documents
    per_deal: int
    deal: Deal
    padding: bool = False
    targets: np.ndarray | None = None

    @classmethod
    def of(
        cls, layout: SequenceLayout, block: int, doc_ids: Tensor | None, targets: np.ndarray | None = None
    ) -> BlockedSequence:
        """From the run's layout, whose block is a multiple of `block`, and doc_ids int [T] (-1: padding).

        targets: bool [T], tokens that are trained to predict the next one.
        """
        deal: Deal = "striped" if layout.kind == "striped" else "contiguous"
        per_deal = layout.block // block
        fine = layout
        if per_deal > 1:
            owners = np.repeat(layout.block_owner, per_deal)[: -(-layout.num_tokens // block)]
            fine = SequenceLayout.dealt(owners.tolist(), layout.num_tokens, layout.world_size, block)
        documents = documents_of(doc_ids, layout.num_tokens, block)[0]
        padding = bool(doc_ids is not None and layout.num_tokens and int(doc_ids.reshape(-1)[-1]) < 0)
        by_block = None
        if targets is not None:
            missing = fine.num_blocks * block - layout.num_tokens
            by_block = np.pad(targets, (0, missing)).reshape(fine.num_blocks, block).any(1)
        return cls(fine, documents, per_deal, deal, padding, by_block)

    @property
    def num_blocks(self) -> int:
        return self.layout.num_blocks

    @property
    def block(self) -> int:
        return self.layout.block

    @cached_property
    def doc_of_block(self) -> np.ndarray:
        """The document of each block that lies in one, int64 [N]; -1 in padding.

        A block in which several documents meet is a document of its own, and so is always kept: in it they
        begin and end, and short ones lie in it whole.
        """
        first, last = self.documents.of_first, self.documents.of_last
        docs = np.where(first == last, first, len(self.documents.starts) + np.arange(self.num_blocks))
        if self.padding:
            docs[first == len(self.documents.starts) - 1] = -1
        return docs.astype(np.int64)

    def forced(self, *, sinks: int, local: int, targets: bool) -> np.ndarray:
        """Blocks to keep whatever their score, bool [N]: the first and last of every document, those that
        hold targets, and a short last block of the sequence, so that shapes don't depend on the choice."""
        docs = self.doc_of_block
        new = np.flatnonzero(np.diff(docs, prepend=docs[:1] - 1))
        ends = np.append(new[1:], self.num_blocks)
        place = np.arange(self.num_blocks)
        run = np.searchsorted(new, place, side="right") - 1
        forced = np.zeros(self.num_blocks, bool)
        if self.num_blocks:
            forced |= (place - new[run] < sinks) | (ends[run] - place <= local)
            forced[-1] |= self.layout.num_tokens % self.block != 0
        if targets and self.targets is not None:
            forced |= self.targets
        return forced & (docs >= 0)

    def quotas(self, ratio: float, strata: int, *, sinks: int, local: int, targets: bool) -> Quotas:
        """What a layer with this ratio keeps. A stratum is one of layout blocks: ranks hold whole strata."""
        return plan_quotas(
            self.num_blocks,
            ratio,
            strata=strata,
            deal=self.deal,
            per_deal=self.per_deal,
            forced=self.forced(sinks=sinks, local=local, targets=targets),
            doc_of_block=self.doc_of_block,
        )

    def num_tokens_of(self, kept: np.ndarray) -> int:
        """Tokens in these ascending blocks."""
        short = self.num_blocks * self.block - self.layout.num_tokens
        last = len(kept) and kept[-1] == self.num_blocks - 1
        return len(kept) * self.block - (short if last else 0)

    def token_ids(self, kept: np.ndarray) -> np.ndarray:
        """Ids of the tokens of these ascending blocks in the whole sequence, int64, ascending."""
        ids = (kept[:, None] * self.block + np.arange(self.block)).reshape(-1)
        return ids[ids < self.layout.num_tokens]

    def kept_layout(self, kept: np.ndarray) -> SequenceLayout:
        """The sequence of the kept blocks: each stays with its owner, their order is that of the document."""
        owners = tuple(self.layout.block_owner[kept].tolist())
        tokens = self.num_tokens_of(kept)
        return SequenceLayout.dealt(owners, tokens, self.layout.world_size, self.block)

    def rows_of(self, rank: int, kept: np.ndarray) -> np.ndarray:
        """Where the kept tokens of `rank` lie in its shard, int64, ascending."""
        own = self.layout.blocks(rank)
        place = np.flatnonzero(np.isin(own, kept))
        rows = (place[:, None] * self.block + np.arange(self.block)).reshape(-1)
        return rows[rows < self.layout.length(rank)]

    def visible_pairs(self, rows: np.ndarray, cols: np.ndarray) -> int:
        """Visible (query, key) pairs of queries in blocks `rows` and keys in blocks `cols`, ascending."""
        docs = self.documents
        queries = docs.query_run[1] - docs.query_run[0]
        keys = np.zeros(self.num_blocks + 1, np.int64)
        chosen = np.zeros(self.num_blocks, bool)
        chosen[cols] = True
        keys[1:] = np.cumsum(np.where(chosen, docs.key_run[1] - docs.key_run[0], 0))
        # Earlier blocks of the row's first document, and the row's own block.
        earlier = (queries[rows] * (keys[rows] - keys[docs.low[rows]])).sum()
        own = rows[chosen[rows]]
        return int(earlier + docs.pairs(own, own).sum())


def as_blocks(kept: Tensor) -> np.ndarray:
    """Kept block ids int64 [K] on the host."""
    return kept.detach().to("cpu", torch.int64).numpy()
