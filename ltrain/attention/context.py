"""What attention needs to know of the tokens at hand, as mcore's `packed_seq_params` carries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ltrain.parallel.layout import SequenceLayout


@dataclass
class AttentionContext(PackedSeqParams):
    """One micro-batch's sequence as this rank sees it.

    `layout` and `group` say how the sequence is sharded; `rope_positions` int32 [T_local] are positions
    inside the document, in the shard's order; `doc_ids` int32 [T] names each token's document over the whole
    sequence in document order (None: one document). `schedule` is the group's own exchange (None: the run's).
    Values that the layers share, such as RoPE tables and
    indices of static patterns, are computed once through `cached`.
    """

    layout: SequenceLayout | None = None
    group: dist.ProcessGroup | None = None
    rank: int = 0
    rope_positions: Tensor | None = None
    doc_ids: Tensor | None = None
    rope_tables: tuple[Tensor, Tensor] | None = None
    node_size: int | None = None
    schedule: str | None = None
    densities: dict[int, float] = field(default_factory=dict)
    _cache: dict[Any, Any] = field(default_factory=dict)

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]
