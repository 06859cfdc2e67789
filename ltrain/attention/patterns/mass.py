"""How much of the attention a pattern keeps: a diagnosis, on request."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ltrain.attention.patterns.base import Selection
from ltrain.attention.patterns.documents import documents_of
from ltrain_kernels.block_sparse import BlockIndex


@torch.no_grad()
def attention_mass(
    q: Tensor,
    k: Tensor,
    selection: Selection | BlockIndex,
    *,
    doc_ids: Tensor | None = None,
    scale: float | None = None,
    row_blocks: list[int] | None = None,
) -> Tensor:
    """Share of the dense causal softmax that the selection keeps: fp32 [B, Hq], the mean over queries.

    q [B, T, Hq, D], k [B, T, Hkv, D], the whole sequence in document order; doc_ids int [T] or [B, T].
    `row_blocks` are the blocks of queries to average over (all by default). Holds block x T logits a head
    at a time in fp32.
    """
    selection = selection if isinstance(selection, Selection) else Selection(selection)
    index, keys = selection.index, selection.verticals
    batch, length, num_heads, head_dim = q.shape
    documents = documents_of(doc_ids, length, index.block_q)
    scale = head_dim**-0.5 if scale is None else scale
    rows = list(range(index.num_rows)) if row_blocks is None else row_blocks
    ptr, col = index.entries(torch.tensor(rows, dtype=torch.int64, device=index.device))
    kept, queries = torch.zeros(batch, num_heads, dtype=torch.float64), 0
    for number, row in enumerate(rows):
        first, stop = row * index.block_q, min((row + 1) * index.block_q, length)
        queries += stop - first
        for b in range(batch):
            docs = documents[b if len(documents) > 1 else 0]
            # Documents by their start: a key before its query's document is hidden, as is a later one.
            start = docs.starts[np.searchsorted(docs.starts, np.arange(first, stop), side="right") - 1]
            low = int(start.min())
            token = torch.arange(low, stop, device=q.device)
            hidden = token[None] > torch.arange(first, stop, device=q.device)[:, None]
            hidden |= token[None] < torch.from_numpy(start).to(q.device)[:, None]
            for head in range(num_heads):
                kv = head * k.shape[2] // num_heads
                logits = (q[b, first:stop, head].float() @ k[b, low:stop, kv].float().T) * scale
                logits.masked_fill_(hidden, -torch.inf)
                ib, ih = (b if index.batch > 1 else 0), head * index.heads // num_heads
                chosen = torch.zeros(index.num_cols, dtype=torch.bool, device=q.device)
                chosen[col[ptr[ib, ih, number] : ptr[ib, ih, number + 1]].long()] = True
                seen = chosen[token // index.block_k]
                if keys is not None:
                    seen = seen | keys.mask[b, head * keys.mask.shape[1] // num_heads, low:stop]
                share = (logits.masked_fill(~seen, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)).exp()
                kept[b, head] += float(share.sum())
    return (kept / max(queries, 1)).float()
