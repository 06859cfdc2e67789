"""XAttention: blocks by the attention along antidiagonals (arXiv 2503.16428, section 2)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ltrain.attention.patterns.base import Capabilities, DynamicPattern, Selection, Shape
from ltrain.attention.patterns.documents import Documents
from ltrain.attention.patterns.exchange import Gather, Place, Steps
from ltrain.attention.patterns.pooling import forced_columns, keep_share, run_exists, run_means
from ltrain.attention.patterns.rows import from_bits, pack_bits
from ltrain.config.base import ConfigError
from ltrain.config.patterns import XAttentionFields


class XAttention(XAttentionFields, DynamicPattern):
    """Keeps, row by row, the fewest blocks that reach `threshold` of the estimated attention.

    The estimate is a softmax over `stride` x `stride` tiles of the tile's mean antidiagonal logit, summed
    to blocks. Queries and keys are averaged over `pool` tokens first; pool 1 is the published score, which
    needs every key. The diagonal and the document's first block are always kept (the first *column*, not
    the first row). Head axis Hkv (estimates summed over the group) or Hq. Two collectives: pooled keys (1 /
    pool of the keys), rows' choices.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(True, True, True, "Hkv, Hq", collectives=2)

    def steps(
        self, q: Tensor, k: Tensor, shape: Shape, place: Place, module: nn.Module | None = None
    ) -> Steps:
        block, docs = shape.block, shape.documents
        if block % self.stride:
            raise ConfigError(
                "attention.pattern.stride", self.stride, f"must divide the block of {block} tokens"
            )
        keys = run_means(k, place, docs, self.pool, keys=True).to(k.dtype)
        keys = (yield Gather(keys, place.block_owner)).float()
        # Inside a tile the queries run backwards: that pairs them along the antidiagonal.
        queries = run_means(q, place, docs, self.pool, keys=False)
        queries = self._tiles(queries.unflatten(2, (-1, self.stride // self.pool)).flip(3).flatten(2, 3))
        # [B, Hkv, F, all tiles]: laid out once, so that a row's columns are a slice.
        keys = self._tiles(keys).permute(1, 2, 4, 0, 3).flatten(3)
        tiles = block // self.stride
        key_exists = run_exists(docs, self.stride, keys=True).to(q.device)
        query_exists = run_exists(docs, self.stride, keys=False).to(q.device)
        group = shape.num_heads // shape.num_kv_heads
        batch = q.shape[0]
        heads = shape.num_kv_heads if self.heads == "kv" else shape.num_heads
        rows = torch.zeros(
            len(place.blocks), batch, heads, docs[0].num_blocks, dtype=torch.bool, device=q.device
        )
        for i, row in enumerate(place.blocks.tolist()):
            for b in range(batch):
                d = b if len(docs) > 1 else 0
                low = int(docs[d].low[row])
                exists = key_exists[low : row + 1, d].clone()
                # The diagonal's pooled keys are of its last document, which may not be its queries'.
                exists[-1] &= bool(docs[d].of_first[row] == docs[d].of_last[row])
                scores = self._row_scores(
                    queries[i, b],
                    keys[b, ..., low * tiles : (row + 1) * tiles],
                    query_exists[row, d],
                    exists,
                    group,
                )
                rows[i, b, :, low : row + 1] = keep_share(scores, self._forced(row, docs[d]), self.threshold)
        packed = yield Gather(pack_bits(rows.flatten(1, 2)), place.block_owner)
        return Selection(from_bits(packed, batch, heads, block))

    def _tiles(self, means: Tensor) -> Tensor:
        """[n, B, runs, H, D] -> [n, B, H, tiles, runs of a tile * D]."""
        cut = means.unflatten(2, (-1, self.stride // self.pool))
        return cut.permute(0, 1, 4, 2, 3, 5).flatten(-2)

    @staticmethod
    def _forced(row: int, docs: Documents) -> list[int]:
        low = int(docs.low[row])
        return [column - low for column in forced_columns(row, docs, 1, 1)]

    def _row_scores(
        self, queries: Tensor, keys: Tensor, query_exists: Tensor, key_exists: Tensor, group: int
    ) -> Tensor:
        """Estimated attention of one row on its columns, [Hkv or Hq, C].

        queries [Hq, m, F], keys [Hkv, F, C * m], which tiles exist bool [m] and [C, m].
        """
        tiles, heads, width = queries.shape[1], keys.shape[0], keys.shape[1]
        runs = self.stride // self.pool
        grouped = queries.unflatten(0, (heads, group)).flatten(1, 2)
        logits = torch.bmm(grouped, keys) * ((width // runs) ** -0.5 / runs)
        logits = logits.view(heads, group, tiles, -1, tiles)
        hidden = ~key_exists[None].expand(tiles, -1, -1).clone()
        hidden[:, -1] |= torch.ones(tiles, tiles, dtype=torch.bool, device=keys.device).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf).flatten(-2)
        # A row of tiles always sees something, or it has no query of this document and counts for nothing.
        share = logits.softmax(-1).nan_to_num(0.0).view(heads, group, tiles, -1, tiles).sum(-1)
        share = (share * query_exists[:, None]).sum(2)
        return share.sum(1) if self.heads == "kv" else share.flatten(0, 1)
