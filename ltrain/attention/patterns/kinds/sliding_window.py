"""The nearest tokens, and the first tokens of the document (attention sinks, arXiv 2309.17453)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ltrain.attention.patterns.base import Capabilities, Pattern, Shape
from ltrain.attention.patterns.documents import Documents
from ltrain.attention.patterns.rows import ranges
from ltrain.config.patterns import SlidingWindowFields
from ltrain_kernels.block_sparse import BlockIndex
from ltrain_kernels.block_sparse import sliding_window as closed_form


class SlidingWindow(SlidingWindowFields, Pattern):
    """Selects the blocks that hold any of the `window` nearest tokens or of the document's first `sinks`
    tokens.

    Head axis 1; a closed form where there is one document, else two runs of blocks a row.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(True, True, True, "1")

    def build(self, shape: Shape) -> BlockIndex:
        local = local_blocks(self.window, shape.block)
        if not any(docs.packed for docs in shape.documents):
            sinks = -(-self.sinks // shape.block)
            return closed_form(shape.num_tokens, shape.block, local=local, sinks=sinks).to(shape.device)
        return ranges(shape.documents, [_runs(docs, local, self.sinks) for docs in shape.documents]).to(
            shape.device
        )


def local_blocks(window: int, block: int) -> int:
    """Block diagonals, the main one counted, such that every query sees its `window` nearest tokens."""
    return -(-(window - 1) // block) + 1


def _runs(docs: Documents, local: int, sinks: int) -> tuple[np.ndarray, np.ndarray]:
    row = np.arange(docs.num_blocks)
    near = np.maximum(docs.low, row - local + 1)
    first_token = docs.starts[docs.of_first]
    sink_end = np.where(sinks > 0, (first_token + sinks - 1) // docs.block + 1, docs.low)
    return np.stack([docs.low, near]), np.stack([np.minimum(sink_end, near), row + 1])
