"""S2: every key/value head sees the local blocks and its own strided shard (arXiv 2407.17678, section 3)."""

from __future__ import annotations

import warnings
from typing import ClassVar

from ltrain.attention.patterns.base import Capabilities, Pattern, Shape, within_documents
from ltrain.config.patterns import S2Fields
from ltrain_kernels.block_sparse import BlockIndex, strided


class S2(S2Fields, Pattern):
    """Selects block j for row i of head h iff i - j < local_blocks or (j + h * step + offset) mod stride ==
    0.

    h is the *global* key/value head, so a tensor-parallel or head-sharded rank gets its part of the same
    whole; the last `dense_heads` of the model see everything. Head axis Hkv, closed form where there is one
    document. Block ids are absolute in the sequence: a block that a head has dropped never comes back (what
    makes its shard small).
    """

    capabilities: ClassVar[Capabilities] = Capabilities(True, True, True, "Hkv")

    def residues(self, total_kv_heads: int) -> list[int]:
        """Column residue of every key/value head of the model, in 0..stride-1."""
        step = self.head_step or max(1, self.stride // total_kv_heads)
        return [-(head * step + self.head_offset) % self.stride for head in range(total_kv_heads)]

    def covers_everything(self, total_kv_heads: int) -> bool:
        """Whether every earlier block is seen by some head of the model."""
        return self.dense_heads > 0 or len(set(self.residues(total_kv_heads))) == self.stride

    def build(self, shape: Shape) -> BlockIndex:
        total = shape.total_kv_heads
        residues = self.residues(total)
        if not self.covers_everything(total):
            warnings.warn(
                f"s2: the {total} key/value heads see {len(set(residues))} of stride={self.stride} residues; "
                "part of the far context is seen by no head; use a stride of at most the number of heads, or "
                "dense_heads",
                stacklevel=2,
            )
        own = range(shape.kv_head_offset, shape.kv_head_offset + shape.num_kv_heads)
        index = strided(
            shape.num_tokens,
            shape.block,
            local=self.local_blocks,
            stride=self.stride,
            residues=[residues[head] for head in own],
            dense_heads=[i for i, head in enumerate(own) if head >= total - self.dense_heads],
        )
        return within_documents(index, shape)
