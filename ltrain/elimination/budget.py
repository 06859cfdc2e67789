"""Spending a budget over layers: the ratios whose measured loss rises least for what they save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

LEVELS = (1.0, 0.75, 0.5, 0.375, 0.25)


@dataclass(frozen=True)
class Allocation:
    """Ratios of all layers, their cost as a share of the dense cost, and the sum of the layers' own losses
    above dense. `reached` says whether the cost is within the target."""

    ratios: tuple[float, ...]
    share: float
    predicted_loss: float
    reached: bool


def allocate(
    losses: Sequence[Sequence[float]], cost: Callable[[Sequence[float]], float], target: float
) -> Allocation:
    """Lower one layer's ratio at a time, where the loss rises least per saving, until the cost is within
    `target` of dense.

    losses[l][i] is the rise of the loss where only layer l is sparse, with ratio LEVELS[i]; `cost` gives the
    whole model's cost for ratios. Steps may skip levels, so that a level that measures worse than a cheaper
    one never blocks the way. Ties go to the earlier layer and the smaller step.
    """
    level = [0] * len(losses)
    dense = cost([1.0] * len(losses))

    def ratios(of: Sequence[int]) -> list[float]:
        return [LEVELS[i] for i in of]

    share = 1.0
    while share > target:
        best: tuple[float, int, int] | None = None
        now = cost(ratios(level))
        for layer, at in enumerate(level):
            for step in range(at + 1, len(LEVELS)):
                trial = [*level[:layer], step, *level[layer + 1 :]]
                saved = now - cost(ratios(trial))
                if saved <= 0:
                    continue
                price = (losses[layer][step] - losses[layer][at]) / saved
                if best is None or price < best[0]:
                    best = (price, layer, step)
        if best is None:
            break
        level[best[1]] = best[2]
        share = cost(ratios(level)) / dense
    rise = sum(row[i] for row, i in zip(losses, level, strict=True))
    return Allocation(tuple(ratios(level)), share, rise, share <= target)
