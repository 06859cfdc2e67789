"""MoBA-like choice of blocks: mean query against mean key (arXiv 2502.13189, section 2.2), one list a query
block.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ltrain.attention.patterns.base import Capabilities, DynamicPattern, Selection, Shape
from ltrain.attention.patterns.exchange import Gather, Place, Steps
from ltrain.attention.patterns.pooling import forced_columns, keep_top_k, run_means
from ltrain.attention.patterns.rows import from_bits, pack_bits
from ltrain.config.patterns import BlockTopKFields


class BlockTopK(BlockTopKFields, DynamicPattern):
    """Keeps the diagonal, the document's first blocks and the best others by q_mean . k_mean, `top_k` in
    all.

    MoBA gates every query token; here the queries of a block share a list, by the mean of their gates (the
    gate is linear in the query, so that is the gate of the mean query). Head axis Hkv (gates summed over
    the group) or Hq. Two collectives: mean keys, then the rows' choices.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(True, True, True, "Hkv, Hq", collectives=2)

    def steps(
        self, q: Tensor, k: Tensor, shape: Shape, place: Place, module: nn.Module | None = None
    ) -> Steps:
        block, docs = shape.block, shape.documents
        keys = run_means(k, place, docs, block, keys=True).squeeze(2)
        keys = yield Gather(keys, place.block_owner)
        queries = run_means(q, place, docs, block, keys=False).squeeze(2)
        group = shape.num_heads // shape.num_kv_heads
        queries = queries.unflatten(2, (shape.num_kv_heads, group))
        if self.heads == "kv":
            queries = queries.sum(3, keepdim=True)
        batch, heads = queries.shape[1], queries.shape[2] * queries.shape[3]
        rows = torch.zeros(
            len(place.blocks), batch, heads, docs[0].num_blocks, dtype=torch.bool, device=q.device
        )
        for i, row in enumerate(place.blocks.tolist()):
            for b in range(batch):
                own = docs[b if len(docs) > 1 else 0]
                low = int(own.low[row])
                # [Hkv, group or 1, D] x [Hkv, columns, D]; of one shape for a row on any number of ranks.
                score = torch.bmm(queries[i, b], keys[low : row + 1, b].permute(1, 2, 0))
                forced = [c - low for c in forced_columns(row, own, self.sink_blocks, 1)]
                rows[i, b, :, low : row + 1] = keep_top_k(score.flatten(0, 1), forced, self.top_k)
        packed = yield Gather(pack_bits(rows.flatten(1, 2)), place.block_owner)
        return Selection(from_bits(packed, batch, heads, block))
