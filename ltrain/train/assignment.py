"""How a step's rows become each rank's micro-batches; `static` is one context-parallel degree for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
