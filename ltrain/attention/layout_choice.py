"""`parallel.context.layout`: which rank holds which blocks of a packed sequence, by the work that is
predicted.

Pure planning on facts that every rank has, so that ranks agree without a message.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ltrain.attention.patterns import Pattern
from ltrain.attention.work import deal_blocks, rank_imbalance
from ltrain.config.parallel import ContextSection
from ltrain.parallel.layout import SequenceLayout

log = logging.getLogger("ltrain")

TOLERANCE = 1.05


class LayoutChoice:
    """The layout of each sequence, as the section says.

    `dealt` deals blocks longest first by the predicted work of their queries; `auto` does so where striping
    would give the busiest rank over 1.05 times the mean work, and stripes otherwise. `windows` are the
    model's own sliding windows by layer. The first choice is logged with its reason.
    """

    def __init__(
        self, context: ContextSection, pattern: Pattern, windows: Sequence[int | None], *, num_kv_heads: int
    ) -> None:
        self.kind, self.block = context.layout, context.block
        self.pattern, self.windows, self.num_kv_heads = pattern, windows, num_kv_heads
        self._told = False

    def __call__(self, num_tokens: int, world_size: int, doc_ids: Tensor | None = None) -> SequenceLayout:
        if self.kind not in ("auto", "dealt"):
            return SequenceLayout(self.kind, num_tokens, world_size, self.block)
        striped = SequenceLayout("striped", num_tokens, world_size, self.block)
        if world_size == 1:
            return striped
        work = self.row_work(num_tokens, doc_ids)
        before = rank_imbalance(work, striped)
        if self.kind == "auto" and before <= TOLERANCE:
            self._tell(f"striped, the busiest rank has {before:.3f} x the mean work")
            return striped
        dealt = deal_blocks(work, striped)
        after = rank_imbalance(work, dealt)
        if self.kind == "auto" and after >= before:
            self._tell(f"striped, {before:.3f} x the mean work; dealing longest first is no better")
            return striped
        self._tell(
            f"blocks dealt longest first, the busiest rank has {after:.3f} x the mean work "
            f"(striped {before:.3f} x)"
        )
        return dealt

    def row_work(self, num_tokens: int, doc_ids: Tensor | None = None) -> np.ndarray:
        """Predicted blocks that every row of blocks attends, summed over layers, float64 [blocks]."""
        num_layers = len(self.windows)
        kinds = Counter((self.pattern.is_dense_layer(i, num_layers), w) for i, w in enumerate(self.windows))
        total = np.zeros(-(-num_tokens // self.block))
        for (dense, window), count in kinds.items():
            layer = next(
                i
                for i, w in enumerate(self.windows)
                if (self.pattern.is_dense_layer(i, num_layers), w) == (dense, window)
            )
            shape = self.pattern.shape_of(
                num_tokens=num_tokens, num_kv_heads=self.num_kv_heads, block=self.block, doc_ids=doc_ids,
                layer=layer, num_layers=num_layers,
            )  # fmt: skip
            work = self.pattern.row_work(shape)
            if window is not None:
                work = np.minimum(work, -(-(window - 1) // self.block) + 1)
            total += count * work
        return total

    def _tell(self, text: str) -> None:
        if not self._told:
            log.info("layout of the first sequence: %s", text)
            self._told = True
