"""How a step's rows become each rank's micro-batches; `static` is one context-parallel degree for all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ltrain.data.rows import Row
from ltrain.parallel.mesh import Mesh
from ltrain.train.batch import LayoutRule, MicroBatch, make_micro_batch
from ltrain.train.group_times import GroupTimes


class Assignment(Protocol):
    """What the trainer asks of an assignment. All methods but `state_dict` and `close` are collective.

    `times`, where there is one, is marked at every micro-batch of a training step.
    """

    times: GroupTimes | None

    def start(self) -> None:
        """Be ready for the first step; called when checkpoints have been restored."""
        ...

    def batches(self, rows: Sequence[Row]) -> list[MicroBatch]:
        """This rank's micro-batches of a step; each of their lists has the same length on all ranks."""
        ...

    def evaluation(self, rows: Sequence[Row]) -> Iterator[list[MicroBatch]]:
        """Micro-batches of held-out rows, in lists to be run one after another, as many on every rank."""
        ...

    def after_step(self, step: int) -> dict[str, float]:
        """Metrics of the step that has just ended; those that are not reduced count on rank 0."""
        ...

    def state_dict(self) -> dict[str, Any] | None:
        """What a checkpoint keeps, plain JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any] | None) -> None: ...

    def close(self) -> None: ...


class StaticAssignment:
    """Rows are dealt round robin over the data axis and each is sharded over the whole context axis."""

    times: GroupTimes | None = None

    def __init__(self, mesh: Mesh, node_size: int | None, layout: LayoutRule) -> None:
        self.mesh, self.node_size, self.layout = mesh, node_size, layout

    def start(self) -> None:
        """Nothing to prepare."""

    def batches(self, rows: Sequence[Row]) -> list[MicroBatch]:
        mesh = self.mesh
        return [
            make_micro_batch(
                row,
                group=mesh.context.group,
                rank=mesh.context.rank,
                size=mesh.context.size,
                layout=self.layout,
                device=mesh.device,
                node_size=self.node_size,
            )
            for row in rows[mesh.data.rank :: mesh.data.size]
        ]

    def evaluation(self, rows: Sequence[Row]) -> Iterator[list[MicroBatch]]:
        """Rows that do not divide over the data axis are completed with empty targets, so that all ranks run
        alike."""
        size = self.mesh.data.size
        padded = [*rows, *(rows[0].without_targets() for _ in range(-len(rows) % size))]
        for start in range(0, len(padded), size):
            yield self.batches(padded[start : start + size])

    def after_step(self, step: int) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any] | None:
        return None

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """There is no state."""

    def close(self) -> None:
        """Nothing to close."""
