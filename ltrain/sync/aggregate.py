"""The outer update from the contributions of a round: the same bits everywhere, in any order of arrival.

Contributions are added in order of replica name, in float32, with one rounding an operation (no fused
multiply-add), and every data-dependent factor comes from integers or exactly rounded sums. Devices and thread
counts therefore cannot make replicas differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ltrain.sync.compress import sparse_values
from ltrain.sync.payload import Payload

Aggregation = Literal["mean", "senders"]


def gain_of(interval: int, decay: float) -> float:
    """Outer gain G of error feedback when a coordinate is sent every `interval` rounds.

    A constant drift of one per round arrives as (1 - decay^n) / (1 - decay) every n rounds, so
    G = (1 - decay^n) / ((1 - decay) n). Only additions and multiplications: equal on every machine.
    """
    total, power = 0.0, 1.0
    for _ in range(interval):
        total += power
        power *= decay
    return total / interval


@dataclass(frozen=True)
class Aggregate:
    """The aggregated pseudo-gradient of one tensor, float32, and what was seen on the way."""

    update: Tensor
    num_values: int
    touched: int
    replicas: int

    @property
    def interval(self) -> int:
        """Rounds between two sends of a coordinate by a replica, if all are sent equally often."""
        return max(1, round(self.update.numel() * self.replicas / max(1, self.num_values)))

    @property
    def overlap(self) -> float:
        """Mean number of replicas that sent a coordinate, among coordinates that anyone sent."""
        return self.num_values / max(1, self.touched)


def aggregate(
    contributions: dict[str, Payload], rule: Aggregation, clip_to_median: bool, device: torch.device
) -> Aggregate:
    """Combine one tensor's payloads by replica name. `contributions` must not be empty.

    `mean` divides the sum by the number of replicas (arXiv 2508.15706, algorithm 1), `senders` by the number
    that sent the coordinate (its public code). `clip_to_median` scales a contribution down to the median L2
    norm over replicas.
    """
    names = sorted(contributions)
    numel = contributions[names[0]].chunking.numel
    shape = contributions[names[0]].shape
    total = torch.zeros(numel, dtype=torch.float32, device=device)
    senders = torch.zeros(numel, dtype=torch.int32, device=device)
    parts = [sparse_values(contributions[name]) for name in names]
    factors = _median_factors([values for _, values in parts]) if clip_to_median else [1.0] * len(parts)
    for (positions, values), factor in zip(parts, factors, strict=True):
        positions = positions.to(device)
        if factor != 1.0:
            values = values * factor
        # Positions are unique inside a payload: read, add, write needs no atomics.
        total[positions] = total[positions] + values.to(device)
        senders[positions] = senders[positions] + 1
    if rule == "mean":
        total.mul_(1.0 / len(names))
    else:
        total /= senders.clamp(min=1)
    num_values = sum(len(values) for _, values in parts)
    return Aggregate(total.view(shape), num_values, int((senders > 0).sum()), len(names))


def _median_factors(values: list[Tensor]) -> list[float]:
    """min(1, median norm / norm) of every contribution, from exactly rounded sums of squares."""
    squares = [math.fsum(part.double().square().tolist()) for part in values]
    norms = [math.sqrt(square) for square in squares]
    ranked = sorted(norms)
    median = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
    return [min(1.0, median / norm) if norm > 0 else 1.0 for norm in norms]


def gain_corrected_rate(seen: Aggregate, rule: Aggregation, gain: float, decay: float, limit: float) -> float:
    """The outer rate at which the update has the wanted `gain`, whatever replicas, density and rule; at most
    `limit`.

    Under `mean` the gain of rate a is a G; under `senders` a G R / overlap.
    """
    scale = gain_of(seen.interval, decay)
    if rule == "senders":
        scale *= seen.replicas / seen.overlap
    return min(limit, gain / scale)
