"""From packed rows to what one rank computes on."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ltrain.attention.context import AttentionContext
from ltrain.data.rows import IGNORE, Row, Stream
from ltrain.parallel.layout import SequenceLayout


class LayoutRule(Protocol):
    """Decides which of `world_size` ranks holds which tokens of a sequence; equal on all of them."""

    def __call__(self, num_tokens: int, world_size: int, doc_ids: Tensor | None = None) -> SequenceLayout: ...


@dataclass
class MicroBatch:
    """This rank's shard of one sequence: tokens and labels int64 [1, T_local], and the context that attention
    needs.

    `num_targets` counts the shard's labels; `positions` are positions inside the document, int32 [T_local].
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    context: AttentionContext
    num_targets: int
    document_lengths: tuple[int, ...]


def make_micro_batch(
    row: Row | Stream,
    *,
    group: dist.ProcessGroup | None,
    rank: int,
    size: int,
    layout: LayoutRule | SequenceLayout,
    device: torch.device,
    node_size: int | None = None,
    schedule: str | None = None,
) -> MicroBatch:
    """Shard a packed row over a group of `size` ranks, of which this is `rank`, as `layout` says; `schedule`
    takes the place of the run's exchange.

    Labels and positions are derived before the row is cut, so that targets cross shard borders correctly.
    """
    tokens, labels, positions, doc_ids = (torch.from_numpy(x) for x in row.arrays())
    dealt = layout if isinstance(layout, SequenceLayout) else layout(len(tokens), size, doc_ids)
    at = dealt.positions(rank).to(torch.int64)
    local_labels = labels[at].to(torch.int64)
    num_targets = int((local_labels != IGNORE).sum())
    local_positions = positions[at].to(torch.int32).to(device)
    context = AttentionContext(
        qkv_format="sbhd",
        layout=dealt,
        group=group,
        rank=rank,
        rope_positions=local_positions,
        doc_ids=doc_ids.to(torch.int32).to(device),
        node_size=node_size,
        schedule=schedule,
        key=zlib.crc32(tokens.numpy().tobytes()),
        targets=(labels != IGNORE).numpy(),
        num_targets=num_targets,
    )
    return MicroBatch(
        tokens=tokens[at].to(torch.int64).unsqueeze(0).to(device),
        labels=local_labels.unsqueeze(0).to(device),
        positions=local_positions,
        context=context,
        num_targets=num_targets,
        document_lengths=tuple(row.document_lengths),
    )
