"""What attention needs to know of the tokens at hand, as mcore's `packed_seq_params` carries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ltrain.parallel.collectives import Traffic
from ltrain.parallel.layout import SequenceLayout
from ltrain_kernels.block_sparse import BlockIndex


@dataclass(frozen=True)
class Excerpt:
    """What a shorter sequence was taken from: `whole`, of which it holds the blocks `blocks`, ascending.

    `token_ids` int32 [T] are its tokens' places in the whole sequence: masks by distance go by them. `rows`
    int64 [T_local] are its tokens' rows in this rank's shard of `whole`, whose rotary `tables` the layers
    share. `pair_share` is its part of the whole sequence's visible (query, key) pairs. `index` is what a
    pattern has found online in the whole sequence (None: the excerpt itself is to be searched).
    """

    whole: AttentionContext
    blocks: np.ndarray
    token_ids: Tensor
    rows: Tensor
    tables: tuple[Tensor, Tensor]
    pair_share: float
    index: BlockIndex | None = None


@dataclass
class AttentionContext(PackedSeqParams):
    """One micro-batch's sequence as this rank sees it.

    `layout` and `group` say how the sequence is sharded; `rope_positions` int32 [T_local] are positions
    inside the document, in the shard's order; `doc_ids` int32 [T] names each token's document over the whole
    sequence in document order (None: one document). `schedule` is the group's own exchange (None: the run's).
    Values that the layers share, such as RoPE tables and indices of static patterns, are computed once
    through `cached`.

    `key` is a number that names the row whatever rank holds it; `targets` bool [T] marks tokens with a
    target (None: not known). The rest serves layers that drop tokens. `excerpt` says what longer sequence
    this one was taken from. `query_blocks` are the only blocks of the sequence whose queries attend (None:
    all). `real_rows` int64 [T_local] are those rows of the tensors at hand that hold tokens, where others
    were put in to give all tensor-parallel ranks the same number. `record` collects (out, lse, index) of
    attention; `given` is an (out, lse) to take instead of computing it. `eliminated` holds each sparse
    layer's kept share of tokens and captured share of the score mass.

    `traffic` counts the attention of the micro-batch where it is set. `step` and `num_targets` (of this rank)
    are for losses of the pattern's own, which `pattern_losses` notes by layer.
    """

    layout: SequenceLayout | None = None
    group: dist.ProcessGroup | None = None
    rank: int = 0
    rope_positions: Tensor | None = None
    doc_ids: Tensor | None = None
    rope_tables: tuple[Tensor, Tensor] | None = None
    node_size: int | None = None
    schedule: str | None = None
    traffic: Traffic | None = None
    step: int = 0
    num_targets: int = 0
    pattern_losses: dict[int, Tensor] = field(default_factory=dict)
    densities: dict[int, float] = field(default_factory=dict)
    key: int = 0
    targets: np.ndarray | None = None
    excerpt: Excerpt | None = None
    query_blocks: np.ndarray | None = None
    real_rows: Tensor | None = None
    record: list[tuple[Tensor, Tensor, BlockIndex]] | None = None
    given: tuple[Tensor, Tensor] | None = None
    eliminated: dict[int, tuple[float, float]] = field(default_factory=dict)
    _cache: dict[Any, Any] = field(default_factory=dict)

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]
