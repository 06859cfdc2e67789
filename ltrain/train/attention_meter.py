"""What attention did in a step: time, exchange, and how even its work was over ranks and exchange steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ltrain.parallel.collectives import Traffic
from ltrain.parallel.mesh import Axis, Mesh
from ltrain.train.batch import MicroBatch


class AttentionMeter:
    """Counts the attention of those steps that are logged; others run without a counter.

    `one_group` says that every micro-batch is shared by the whole context axis, so that its exchange steps
    are the same on all its ranks.
    """

    def __init__(self, mesh: Mesh, *, one_group: bool) -> None:
        self.mesh, self.one_group = mesh, one_group
        self.traffic: list[Traffic] = []

    def attach(self, batches: Sequence[MicroBatch]) -> None:
        """Count the attention of these micro-batches, forward and backward."""
        self.traffic = [Traffic(batch.context.node_size) for batch in batches]
        for batch, traffic in zip(batches, self.traffic, strict=True):
            batch.context.traffic = traffic

    def local(self, batches: Sequence[MicroBatch], seconds: float) -> dict[str, float]:
        """This rank's metrics of a step of `seconds`; collective over the context axis where there is one
        group.
        """
        counted, self.traffic = self.traffic, []
        tiles = [tiles for traffic in counted for tiles in traffic.step_tiles]
        metrics = {
            "time/attention_s": sum(traffic.seconds("attention") for traffic in counted),
            "time/selection_s": sum(traffic.seconds("selection") for traffic in counted),
            "balance/attention_work": sum(tiles),
        }
        losses = [float(loss) for batch in batches for loss in batch.context.pattern_losses.values()]
        if losses:
            metrics["sparse/pattern_loss"] = sum(losses) / len(losses)
        layouts = [batch.context.layout for batch in batches]
        if any(layout is not None and layout.world_size > 1 for layout in layouts):
            waits = sum(traffic.wait_s for traffic in counted)
            metrics |= {
                "time/attention_comm_s": waits,
                "comm/bytes_intra_node": float(sum(traffic.bytes_in_node for traffic in counted)),
                "comm/bytes_inter_node": float(sum(traffic.bytes_between_nodes for traffic in counted)),
                "balance/comm_wait_frac": waits / seconds,
            }
        if self.one_group and self.mesh.context.size > 1:
            metrics["balance/exchange_step_max_over_mean"] = step_path(tiles, self.mesh.context)
        return metrics


def step_path(tiles: Sequence[float], axis: Axis) -> float:
    """Work of the busiest rank of every attention call, summed, over the mean rank's work: 1 where no rank
    waits for another at any step of an exchange. Collective over the axis.
    """
    count = torch.tensor([len(tiles)])
    counts = [torch.empty_like(count) for _ in range(axis.size)]
    dist.all_gather(counts, count, group=axis.group)
    longest = max(int(n) for n in counts)
    own = torch.zeros(longest, dtype=torch.float64)
    own[: len(tiles)] = torch.tensor(list(tiles), dtype=torch.float64)
    table = [torch.empty_like(own) for _ in range(axis.size)]
    dist.all_gather(table, own, group=axis.group)
    work = torch.stack(table)
    total = float(work.sum()) / axis.size
    return float(work.amax(0).sum()) / total if total else 1.0
