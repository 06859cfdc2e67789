"""From packed rows to what one rank computes on."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ltrain.attention.context import AttentionContext
from ltrain.data.rows import IGNORE, Row, Stream
from ltrain.parallel.layout import LayoutKind, SequenceLayout


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
    kind: LayoutKind,
    block: int,
    device: torch.device,
    node_size: int | None = None,
    layout: SequenceLayout | None = None,
    schedule: str | None = None,
) -> MicroBatch:
    """Shard a packed row over a group of `size` ranks, of which this is `rank`. `layout` and `schedule` take
    the place of `kind` and of the run's exchange.

    Labels and positions are derived before the row is cut, so that targets cross shard borders correctly.
    """
    tokens, labels, positions, doc_ids = (torch.from_numpy(x) for x in row.arrays())
    layout = layout or SequenceLayout(kind, len(tokens), size, block)
    at = layout.positions(rank).to(torch.int64)
    local_labels = labels[at].to(torch.int64)
    local_positions = positions[at].to(torch.int32).to(device)
    context = AttentionContext(
        qkv_format="sbhd",
        layout=layout,
        group=group,
        rank=rank,
        rope_positions=local_positions,
        doc_ids=doc_ids.to(torch.int32).to(device),
        node_size=node_size,
        schedule=schedule,
        key=zlib.crc32(row.tokens.tobytes()),
        targets=(labels != IGNORE).numpy(),
    )
    return MicroBatch(
        tokens=tokens[at].to(torch.int64).unsqueeze(0).to(device),
        labels=local_labels.unsqueeze(0).to(device),
        positions=local_positions,
        context=context,
        num_targets=int((local_labels != IGNORE).sum()),
        document_lengths=tuple(row.document_lengths),
    )
