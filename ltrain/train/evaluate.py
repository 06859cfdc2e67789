"""Held-out loss by position in the document, over the same engine that trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ltrain.attention.rope import Rope
from ltrain.data.rows import IGNORE, Row
from ltrain.parallel.mesh import Mesh
from ltrain.train.assignment import Assignment
from ltrain.train.batch import MicroBatch
from ltrain.train.step import run_model


def position_buckets(longest: int, given: Sequence[int] = ()) -> tuple[int, ...]:
    """Ascending upper ends of position buckets that cover `longest` positions; powers of two from 128 by
    default.
    """
    ends = [end for end in sorted(set(given)) if end < longest] if given else []
    if not given:
        end = 128
        while end < longest:
            ends.append(end)
            end *= 2
    return (*ends, longest)


@dataclass(frozen=True)
class Evaluation:
    """Loss (nats a token) over all held-out targets and by position bucket; `counts` are targets in each
    bucket.

    Bucket i holds targets whose input position p has `ends[i-1] <= p < ends[i]`.
    """

    loss: float
    ends: tuple[int, ...]
    losses: tuple[float, ...]
    counts: tuple[int, ...]

    def metrics(self) -> dict[str, float]:
        by_position = {
            f"eval/loss_pos/{end}": loss
            for end, loss, count in zip(self.ends, self.losses, self.counts, strict=True)
            if count
        }
        targets = {
            f"eval/targets_pos/{end}": float(count)
            for end, count in zip(self.ends, self.counts, strict=True)
            if count
        }
        whole = {"eval/loss": self.loss, "eval/ppl": float(torch.tensor(self.loss).exp())}
        return {**whole, **by_position, **targets}


def evaluate(
    ddp: Any,
    mesh: Mesh,
    rows: Sequence[Row],
    ends: tuple[int, ...],
    assignment: Assignment,
    rope: Rope | None = None,
) -> Evaluation:
    """Run the rows forward, dealt as the assignment says, and bucket every target's loss by its position.

    `rope` takes the place of the model's rotary embedding, to measure a model as it was before the run.
    """
    sums = torch.zeros(2, len(ends), dtype=torch.float64, device=mesh.device)
    upper = torch.tensor(ends, device=mesh.device)

    def add(batch: MicroBatch, nll: Tensor) -> None:
        at = torch.bucketize(batch.positions.to(torch.int64), upper, right=True).clamp_(max=len(ends) - 1)
        kept = batch.labels.flatten() != IGNORE
        sums[0].index_add_(0, at[kept], nll[kept].double())
        sums[1].index_add_(0, at[kept], torch.ones_like(nll[kept], dtype=torch.float64))

    assignment.start()
    was_training = ddp.training
    ddp.eval()
    with torch.no_grad():
        for batches in assignment.evaluation(rows):
            for batch in batches if rope is not None else ():
                batch.context.rope_tables = rope.tables(batch.positions, device=mesh.device)
            run_model(ddp, mesh, batches, train=False, on_losses=add)
    ddp.train(was_training)
    if mesh.pipeline.size > 1:
        dist.all_reduce(sums, group=mesh.pipeline.group)
    dist.all_reduce(sums, group=mesh.data_context.group)
    total, count = sums.tolist()
    return Evaluation(
        loss=sum(total) / max(sum(count), 1),
        ends=ends,
        losses=tuple(t / c if c else float("nan") for t, c in zip(total, count, strict=True)),
        counts=tuple(int(c) for c in count),
    )
