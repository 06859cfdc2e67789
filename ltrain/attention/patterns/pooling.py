"""Means of queries and keys over runs of tokens, per document, and the choice of blocks from scores.

B batch, H heads, D head size, n own blocks, N blocks of the sequence. A block's keys are pooled over its last
document's tokens and its queries over its first document's (see documents.py): no other pair crosses blocks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ltrain.attention.patterns.documents import Documents
from ltrain.attention.patterns.exchange import Place


def in_blocks(x: Tensor, place: Place) -> Tensor:
    """A shard [B, T_local, H, D] as [B, n, block, H, D], the last block filled with zeros where it is
    short.
    """
    num_blocks = len(place.blocks)
    missing = num_blocks * place.block - x.shape[1]
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing))
    return x.unflatten(1, (num_blocks, place.block))


def valid_tokens(documents: list[Documents], blocks: np.ndarray, *, keys: bool) -> Tensor:
    """Bool [1 or B, len(blocks), block]: the tokens over which a block's keys (or queries) are pooled."""
    rows = []
    for docs in documents:
        start, stop = docs.key_run if keys else docs.query_run
        token = blocks[:, None] * docs.block + np.arange(docs.block)
        rows.append(torch.from_numpy((token >= start[blocks, None]) & (token < stop[blocks, None])))
    return torch.stack(rows)


def run_means(x: Tensor, place: Place, documents: list[Documents], run: int, *, keys: bool) -> Tensor:
    """fp32 means over runs of `run` tokens, [n, B, block / run, H, D]; 0 where a run has no valid token.

    Each block is reduced by itself, so the result does not depend on which other blocks the rank holds.
    """
    runs = place.block // run
    valid = valid_tokens(documents, place.blocks, keys=keys).to(x.device).unflatten(2, (runs, run))
    cut = in_blocks(x, place).unflatten(2, (runs, run)).float()
    weight = valid[..., None, None].float()
    mean = (cut * weight).sum(3) / weight.sum(3).clamp(min=1)
    return mean.transpose(0, 1).contiguous()


def run_exists(documents: list[Documents], run: int, *, keys: bool) -> Tensor:
    """Whether each run of each block has a valid token, bool [N, 1 or B, block / run], on the CPU."""
    blocks = np.arange(documents[0].num_blocks)
    runs = documents[0].block // run
    return valid_tokens(documents, blocks, keys=keys).unflatten(2, (runs, run)).any(-1).transpose(0, 1)


def forced_columns(row: int, docs: Documents, sinks: int, local: int) -> list[int]:
    """Columns that row `row` always keeps: its document's first `sinks` blocks, its `local` nearest."""
    low = int(docs.low[row])
    return sorted({*range(low, min(low + sinks, row)), *range(max(low, row - local + 1), row + 1)})


def keep_top_k(scores: Tensor, forced: list[int], top_k: int) -> Tensor:
    """Bool like scores [..., C]: the forced columns, then the best others until `top_k` are kept.

    Ties go to the earlier column, so the choice is a function of the scores alone.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[..., forced] = True
    more = min(top_k, scores.shape[-1]) - len(forced)
    if more > 0:
        order = scores.masked_fill(kept, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        kept.scatter_(-1, order[..., :more], True)
    return kept


def keep_share(scores: Tensor, forced: list[int], share: float) -> Tensor:
    """Bool like scores [..., C] >= 0: the forced columns, then the best others until `share` of the sum is
    reached.

    The column that crosses the mark is kept. Ties go to the earlier column.
    """
    wide = scores.double()
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[..., forced] = True
    need = share * wide.sum(-1, keepdim=True) - (wide * kept).sum(-1, keepdim=True)
    ranked, order = wide.masked_fill(kept, 0).sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    return kept.scatter(-1, order, kept.gather(-1, order) | ((before < need) & (ranked > 0)))
