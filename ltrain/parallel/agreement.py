"""All ranks agree on what they are about to do, or all of them raise the same error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist

from ltrain.config.base import ConfigError
from ltrain.parallel.collectives import Group, size_of


def agree(
    group: Group,
    facts: Mapping[str, object],
    error: Exception | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Return if no rank of `group` brought an `error` and all brought equal `facts`; else raise on every
    rank.

    One all-gather of a few integers; on a disagreement one more, of the texts. The facts are compared by a
    hash of their `repr`, and every rank must name the same facts. Raises the error of the lowest failing rank
    as ConfigError, or a ConfigError that names the first fact that differs with its value on each rank.
    """
    if size_of(group) == 1:
        if error is not None:
            raise error
        return
    digests = [int.from_bytes(hashlib.sha256(repr(v).encode()).digest()[:7], "big") for v in facts.values()]
    mine = torch.tensor([int(error is not None), *digests], dtype=torch.int64, device=device)
    table = [torch.empty_like(mine) for _ in range(size_of(group))]
    dist.all_gather(table, mine, group=group)
    rows = [row.tolist() for row in table]
    if any(row[0] for row in rows):
        report = (
            (error.field, repr(error.value), error.rule, error.fix)
            if isinstance(error, ConfigError)
            else ("context_parallel", "input", f"failed: {type(error).__name__}: {error}", "")
            if error is not None
            else None
        )
        reports: list[tuple[str, str, str, str] | None] = [None] * size_of(group)
        dist.all_gather_object(reports, report, group=group)
        rank, first = next((r, text) for r, text in enumerate(reports) if text is not None)
        raise ConfigError(
            first[0], _Plain(first[1]), f"{first[2]} (found on rank {rank})", first[3]
        ) from error
    if any(row != rows[0] for row in rows):
        values: list[dict[str, str]] = [{}] * size_of(group)
        dist.all_gather_object(
            values, {name: repr(value)[:200] for name, value in facts.items()}, group=group
        )
        for column, name in enumerate(facts):
            if len({row[column + 1] for row in rows}) > 1:
                by_rank = {rank: value[name] for rank, value in enumerate(values)}
                raise ConfigError(name, _Plain(str(by_rank)), "must be equal on all ranks of the group")


class _Plain(str):
    """A text that prints without quotes."""

    def __repr__(self) -> str:
        return str(self)
