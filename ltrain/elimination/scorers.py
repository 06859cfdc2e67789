"""How blocks are ranked: one class a scorer, chosen by `elimination.scorer.kind`.

A scorer gives fp32 scores [N] of the sequence's blocks, the same on every rank; higher is kept. Scores of
`pooled`, `lemo` and `predictor` are masses: what part of their sum lies in the kept blocks is reported as
`elim/captured_mass`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ltrain.attention.rope import apply_rope
from ltrain.config.elimination import LemoScorer, PooledScorer, RandomScorer, RecencyScorer, ScorerConfig
from ltrain.elimination.counter import random_scores
from ltrain.elimination.inputs import LayerInputs
from ltrain.elimination.pooled import column_mass
from ltrain_kernels.block_scores import block_scores


class Scorer(Protocol):
    """`score` is called by all ranks of a context- and tensor-parallel group alike, without gradient."""

    def score(self, inputs: LayerInputs) -> Tensor: ...


class Pooled:
    """Column mass of the causal softmax between block means of rotated queries and keys.

    With `pool="means"` a block's mean hidden state is projected and rotated by its mean rotation; with
    "tokens" every token is projected and rotated, and then the mean is taken.
    """

    def __init__(self, config: PooledScorer) -> None:
        self.pool = config.pool

    def score(self, inputs: LayerInputs) -> Tensor:
        packed = inputs.sequence.documents.packed
        if self.pool == "tokens":
            q, k = (inputs.rotated_means(keys=keys) for keys in (False, True))
        else:
            hidden = inputs.hidden_means(keys=True)
            q, k = inputs.project(hidden)
            if packed:
                q, _ = inputs.project(inputs.hidden_means(keys=False))
            q = apply_rope(q[:, None], *(x[:, None] for x in inputs.mean_rotation(keys=False)))[:, 0]
            k = apply_rope(k[:, None], *(x[:, None] for x in inputs.mean_rotation(keys=True)))[:, 0]
        scale = inputs.attention.core_attention.scale or q.shape[-1] ** -0.5
        mass = column_mass(q, k, inputs.earliest_visible(), inputs.token_counts(keys=True), scale)
        return inputs.sum_over_heads(mass)


class Lemo:
    """Sum over query blocks of the tile maximum of mean_heads relu(q k), before rotation (arXiv 2501.09767,
    equations 1 and 2). Needs all tokens and heads on one rank.
    """

    def __init__(self, config: LemoScorer) -> None:
        self.causal = config.causal

    def score(self, inputs: LayerInputs) -> Tensor:
        return lemo_target(inputs, causal=self.causal).sum(0)


def lemo_target(inputs: LayerInputs, *, causal: bool) -> Tensor:
    """The published importance of every block pair of a document, fp32 [N, N]; 0 between documents."""
    q, k = inputs.queries_and_keys()
    pairs = block_scores(q, k, inputs.sequence.block, causal=causal)[0]
    docs = inputs.sequence.documents
    if docs.packed:
        first, last = (torch.from_numpy(x).to(pairs.device) for x in (docs.of_first, docs.of_last))
        pairs = pairs * ((first[:, None] <= last[None]) & (last[:, None] >= first[None]))
    return pairs


class Random:
    """Uniform scores from (seed, step, layer, row): no generator is read or moved."""

    def score(self, inputs: LayerInputs) -> Tensor:
        key = (inputs.seed, inputs.step, inputs.layer, inputs.context.key)
        return random_scores(inputs.sequence.num_blocks, *key).to(inputs.x.device)


class Recency:
    """The later the better."""

    def score(self, inputs: LayerInputs) -> Tensor:
        order = np.arange(inputs.sequence.num_blocks, dtype=np.float32)
        return torch.from_numpy(order).to(inputs.x.device)


def from_config(config: ScorerConfig) -> Scorer:
    """The scorer of a configuration section."""
    match config:
        case PooledScorer():
            return Pooled(config)
        case LemoScorer():
            return Lemo(config)
        case RandomScorer():
            return Random()
        case RecencyScorer():
            return Recency()
    raise TypeError(type(config).__name__)
