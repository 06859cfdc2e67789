"""Which queries `vertical_slash` watches, and what they attend: statistics of one shard of keys.

G query heads of a key/value head, M queries of a window, n own key blocks. The attention of watched queries
is put on a grid of 2^-32 before it is summed. Sums of such integers are exact in fp64, hence the same in
any order, on any number of ranks; and the normaliser is rounded to 2^-12 so that its own order of summation
cannot show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ltrain.attention.patterns.documents import Documents

# One unit of attention probability, as an integer.
ONE = 2.0**32
LSE_GRID = 2.0**12


@dataclass(frozen=True)
class Window:
    """Queries `rows` (token ids, consecutive) of document `doc` of sequence `b`."""

    b: int
    doc: int
    rows: np.ndarray


def windows_of(
    documents: list[Documents], batch: int, *, observed: int, anchors: int, dense_below: int
) -> list[Window]:
    """The windows of every document longer than `dense_below`, at the ends of `anchors` equal parts of it."""
    found = []
    for b in range(batch):
        docs = documents[b if len(documents) > 1 else 0]
        for doc, (start, end) in enumerate(zip(docs.starts.tolist(), docs.ends.tolist(), strict=True)):
            if end - start <= dense_below:
                continue
            stops = sorted({start + (end - start) * (a + 1) // anchors for a in range(anchors)} - {start})
            found += [Window(b, doc, np.arange(max(start, stop - observed), stop)) for stop in stops]
    return found


@dataclass(frozen=True)
class Watched:
    """One window against the own key blocks `blocks` (ids), for one key/value head.

    `weight` fp32 [n, G * M, block] is exp(logit - top), `top` fp32 [n, G * M] the largest visible logit of
    the block (-inf where nothing is visible): both depend on the block alone.
    """

    blocks: np.ndarray
    weight: Tensor
    top: Tensor

    def partial_normaliser(self) -> tuple[Tensor, Tensor]:
        """(largest logit, sum of exp relative to it), fp64 [G * M], over these blocks."""
        top = self.top.double()
        if not len(self.blocks):
            nothing = top.new_zeros(self.top.shape[1])
            return nothing - torch.inf, nothing
        best = top.amax(0)
        scale = (top - best.masked_fill(best == -torch.inf, 0)).exp()
        # A block's sum is taken in fp32: it depends on the block alone, and widening costs a copy.
        return best, (self.weight.sum(-1).double() * scale).sum(0)

    def probability(self, lse: Tensor, which: slice | Tensor) -> Tensor:
        """Attention to blocks `which` in units of 2^-32, integers in fp64 [n, G * M, block]; lse [G * M] as
        from `normaliser`.
        """
        scale = (self.top[which].double() - lse).exp_().mul_(ONE)
        return self.weight[which].double().mul_(scale[..., None]).round_()


def normaliser(best: Tensor, total: Tensor) -> Tensor:
    """Log-sum-exp over ranks of their partial normalisers [ranks, ...], on the grid of 2^-12, fp64.

    Every watched query sees at least itself, so the result is finite.
    """
    top = best.amax(0)
    lse = top + (total * (best - top).exp()).sum(0).log()
    return (lse * LSE_GRID).round() / LSE_GRID


def watch(
    queries: Tensor, keys: Tensor, window: Window, docs: Documents, blocks: np.ndarray, own: np.ndarray
) -> Watched:
    """Score a window: queries [M, G, D] and this rank's key blocks [own blocks, block, D] of one key/value
    head.

    `own` are the ids of all the rank's blocks, `blocks` those that the window sees, neighbours in `own`.
    """
    num_queries, group, head_dim = queries.shape
    first = int(np.searchsorted(own, blocks[0])) if len(blocks) else 0
    picked = keys[first : first + len(blocks)].float().contiguous()
    rows = (queries.float() * head_dim**-0.5).transpose(0, 1).reshape(group * num_queries, head_dim)
    # One matrix product of one shape for each block, so a block's bits don't depend on its neighbours.
    logits = torch.bmm(rows.expand(len(blocks), -1, -1), picked.transpose(1, 2))
    # Only blocks that the document's first key or the window's first query cuts hold keys out of sight.
    start = int(docs.starts[window.doc])
    cut = np.flatnonzero((blocks * docs.block < start) | ((blocks + 1) * docs.block > window.rows[0]))
    if len(cut):
        at = torch.from_numpy(cut).to(keys.device)
        token = torch.from_numpy(blocks[cut, None] * docs.block + np.arange(docs.block)).to(keys.device)
        position = torch.from_numpy(window.rows).to(keys.device)
        hidden = (token[:, None] > position[None, :, None]) | (token[:, None] < start)
        some = logits[at].view(len(cut), group, num_queries, docs.block)
        logits[at] = some.masked_fill_(hidden[:, None], -torch.inf).view_as(logits[at])
    top = logits.amax(-1)
    weight = logits.sub_(top.masked_fill(top == -torch.inf, 0)[..., None]).exp_()
    return Watched(blocks, weight, top)


def visible_blocks(window: Window, docs: Documents, own: np.ndarray) -> np.ndarray:
    """The own blocks in which a window can see a key."""
    return own[(own >= docs.first_block[window.doc]) & (own <= window.rows[-1] // docs.block)]


def leave_out_kept(
    probability: Tensor, window: Window, docs: Documents, blocks: np.ndarray, *, local: int, sinks: int
) -> None:
    """Set the attention [n, ..., M, block] of pairs within the nearest `local` block diagonals or on the
    document's first tokens to 0, in place.
    """
    first = int(docs.starts[window.doc]) + sinks
    near = window.rows[-1] // docs.block - blocks < local + len(window.rows) // docs.block + 1
    some = np.flatnonzero(near | (blocks * docs.block < first))
    if not len(some):
        return
    at = torch.from_numpy(some).to(probability.device)
    far = window.rows[None] // docs.block - blocks[some, None] >= local
    late = blocks[some, None] * docs.block + np.arange(docs.block) >= first
    free = torch.from_numpy(far[:, :, None] & late[:, None, :]).to(probability.device)
    probability[at] *= free.view(len(some), *(1,) * (probability.ndim - 3), *free.shape[1:])


def slash_sums(probability: Tensor, window: Window, docs: Documents, blocks: np.ndarray, out: Tensor) -> None:
    """Add the attention [n, H, M, block] of each bin of distances to `out` [H, bins]; bin t holds distances
    t * block .. (t + 1) * block - 1.

    A query at place p of its block meets bin t in the columns 0..p of one block and in those after p of the
    next one back, so bin t needs the block diagonals t and t + 1. Overwrites `probability`.
    """
    phase = torch.from_numpy(window.rows % docs.block).to(out.device)
    upto = torch.arange(docs.block, device=out.device) <= phase[:, None]
    far = probability.sum(-1)
    near = probability.mul_(upto).sum(-1)
    far -= near
    bin_of = torch.from_numpy(window.rows[None] // docs.block - blocks[:, None]).to(out.device)
    for part, number in ((near, bin_of), (far, bin_of - 1)):
        flat = part.permute(1, 0, 2).flatten(1)
        out.scatter_add_(1, number.clamp(min=0).flatten().expand(len(flat), -1), flat)
