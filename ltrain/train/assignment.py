"""How a step's rows become each rank's micro-batches; `static` is one context-parallel degree for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ltrain.config.base import ConfigError
from ltrain.config.parallel import ContextSection
from ltrain.data.rows import Row
from ltrain.parallel.mesh import Mesh
from ltrain.train.batch import MicroBatch, make_micro_batch


class Assignment(Protocol):
    def batches(self, rows: Sequence[Row]) -> list[MicroBatch]:
        """This rank's micro-batches of a step; each of their lists has the same length on all ranks."""
        ...


class StaticAssignment:
    """Rows are dealt round robin over the data axis and each is sharded over the whole context axis."""

    def __init__(self, context: ContextSection, mesh: Mesh) -> None:
        self.context, self.mesh = context, mesh

    def batches(self, rows: Sequence[Row]) -> list[MicroBatch]:
        mesh = self.mesh
        return [
            make_micro_batch(
                row,
                group=mesh.context.group,
                rank=mesh.context.rank,
                size=mesh.context.size,
                kind=self.context.layout,
                block=self.context.block,
                device=mesh.device,
                node_size=self.context.node_size,
            )
            for row in rows[mesh.data.rank :: mesh.data.size]
        ]


def rows_per_step(tokens_per_step: int, seq_len: int, data_size: int) -> int:
    """Rows of one step. Raises ConfigError where they cannot be dealt evenly over the data axis."""
    unit = seq_len * data_size
    if tokens_per_step % unit:
        lower = max(unit, tokens_per_step // unit * unit)
        raise ConfigError(
            "train.tokens_per_step",
            tokens_per_step,
            f"must be a multiple of train.seq_len x data-parallel degree = {seq_len} x {data_size} = {unit}",
            f"use {lower}" + (f" or {lower + unit}" if lower + unit != lower else ""),
        )
    return tokens_per_step // seq_len
