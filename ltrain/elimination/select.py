"""Choosing the blocks of tokens that a layer processes, from scores: `select_blocks`.

B sequences, N blocks of each.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ltrain.config.base import ConfigError
from ltrain.elimination.quotas import Deal, Quotas, plan_quotas


@torch.no_grad()
def select_blocks(
    scores: Tensor,
    ratio: float,
    *,
    strata: int = 1,
    always: Tensor | None = None,
    doc_of_block: Tensor | None = None,
    deal: Deal = "striped",
) -> Tensor:
    """The blocks to keep: int64 [B, kept], ascending and distinct in every row.

    scores [B, N]; always bool [N] or [B, N] are kept whatever their score; doc_of_block int [N] or [B, N] is
    the document of each block, -1 for padding, which is never kept. Every stratum of a document keeps the
    same quota and every document at least one block (`plan_quotas` has the rule and `deal`). Equal scores go
    to the earlier block, so that the choice is a function of its arguments alone; no random state is read or
    changed. Raises ConfigError on shapes that don't fit, on a ratio outside (0, 1], on scores that are not
    numbers, and where sequences of the batch would keep different counts.
    """
    if scores.dim() != 2:
        raise ConfigError("scores.shape", tuple(scores.shape), "must be [B, num_blocks]")
    batch, num_blocks = scores.shape
    rows = []
    for b in range(batch):
        quotas = plan_quotas(
            num_blocks,
            ratio,
            strata=strata,
            deal=deal,
            forced=_row("always", always, b, batch, num_blocks),
            doc_of_block=_row("doc_of_block", doc_of_block, b, batch, num_blocks),
        )
        rows.append(keep_best(scores[b], quotas))
    if len({len(row) for row in rows}) > 1:
        counts = [len(row) for row in rows]
        raise ConfigError(
            "doc_of_block", counts, "makes sequences of a batch keep different counts", "select one at a time"
        )
    return torch.stack(rows) if rows else torch.empty(0, 0, dtype=torch.int64, device=scores.device)


@torch.no_grad()
def keep_best(scores: Tensor, quotas: Quotas) -> Tensor:
    """The kept blocks of one sequence, int64 [kept], ascending: forced ones, then the best of every cell."""
    if scores.shape != (quotas.num_blocks,):
        raise ConfigError("scores.shape", tuple(scores.shape), f"must be [{quotas.num_blocks}]")
    if bool(torch.isnan(scores).any()):
        raise ConfigError("scores", "NaN", "must be numbers")
    device = scores.device
    cell = torch.from_numpy(quotas.cell).to(device)
    forced = torch.from_numpy(quotas.forced).to(device)
    # Stable sorts from the least to the most important key: index, score, forced, cell.
    order = scores.sort(descending=True, stable=True).indices
    order = order[(~forced[order]).to(torch.uint8).sort(stable=True).indices]
    order = order[cell[order].sort(stable=True).indices]
    padding = int((quotas.cell < 0).sum())
    order = order[padding:]
    sizes = np.bincount(quotas.cell[quotas.cell >= 0], minlength=len(quotas.quota))
    starts = np.cumsum(sizes) - sizes
    taken = [np.arange(start, start + count) for start, count in zip(starts, quotas.quota, strict=True)]
    places = np.concatenate(taken) if taken else np.empty(0, np.int64)
    return order[torch.from_numpy(places).to(device)].sort().values


def _row(name: str, x: Tensor | None, b: int, batch: int, num_blocks: int) -> np.ndarray | None:
    if x is None:
        return None
    if tuple(x.shape) not in ((num_blocks,), (1, num_blocks), (batch, num_blocks)):
        rule = f"must be [{num_blocks}] or [{batch}, {num_blocks}]"
        raise ConfigError(f"{name}.shape", tuple(x.shape), rule)
    rows = x.detach().reshape(-1, num_blocks)
    return rows[b if len(rows) > 1 else 0].cpu().numpy()
