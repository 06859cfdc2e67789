"""Training the predictor beside a frozen model: SmoothL1 on the `lemo` score of every block pair."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.elimination.inputs import LayerInputs
from ltrain.elimination.predictor import LayerPredictor, token_blocks
from ltrain.elimination.scorers import lemo_target

log = logging.getLogger("ltrain")

# What runs a row through the model and hands every layer's inputs to a function, which returns nothing.
Forward = Callable[[Callable[[LayerInputs], None]], None]


@dataclass(frozen=True)
class FitSettings:
    """Pruning begins at step `prune_every` with frequency `frequency`, which falls by 0.05 each round."""

    learning_rate: float = 1e-3
    prune_every: int = 100
    frequency: float = 0.8
    warmup_steps: int = 20


class Fit:
    """One training of all layers' networks; a layer's loss is its own, relative to its mean target."""

    def __init__(self, layers: nn.ModuleList, settings: FitSettings) -> None:
        self.layers, self.settings = layers.train(), settings
        self.scale: dict[int, float] = {}
        self.round = 0
        self.removed = 0
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.layers.parameters(), lr=self.settings.learning_rate, betas=(0.9, 0.95))

    def step(self, number: int, forward: Forward) -> float:
        """Step `number`, counted from 0: one row, all layers. Returns the sum of the layers' losses."""
        total = 0.0

        def layer(inputs: LayerInputs) -> None:
            nonlocal total
            predictor = self.layers[inputs.layer]
            assert isinstance(predictor, LayerPredictor)
            with torch.no_grad():
                target = lemo_target(inputs, causal=False)
                blocks = token_blocks(inputs)
            scale = self.scale.setdefault(inputs.layer, float(target.mean()) or 1.0)
            with torch.enable_grad():
                loss = pair_loss(predictor, blocks, target / scale)
                loss.backward()
            total += float(loss)

        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * min(1.0, (number + 1) / self.settings.warmup_steps)
        self.optimizer.zero_grad()
        forward(layer)
        self.optimizer.step()
        if (number + 1) % self.settings.prune_every == 0:
            self.prune()
        return total

    def prune(self) -> int:
        """Remove neurons that are mostly zero, and rebuild the optimizer, whose state is of other shapes."""
        frequency = max(0.5, self.settings.frequency - 0.05 * self.round)
        removed = sum(layer.prune(frequency) for layer in self.layers)  # type: ignore[operator]
        self.round += 1
        if removed:
            self.removed += removed
            self.optimizer = self._optimizer()
        return removed


def pair_loss(predictor: LayerPredictor, blocks: Tensor, target: Tensor) -> Tensor:
    """SmoothL1 between predicted and true importance of all pairs, their mean."""
    return F.smooth_l1_loss(predictor.pairs(blocks), target)


def recall(scores: Tensor, truth: Tensor, ratio: float = 0.4) -> float:
    """Share of the best `ratio` of the blocks by `truth` that `scores` put among theirs (chance: ratio)."""
    count = max(1, int(ratio * len(truth)))
    best, found = (set(x.topk(count).indices.tolist()) for x in (truth, scores))
    return len(best & found) / count


def run_fit(fit: Fit, rows: Iterable[Forward], steps: int) -> list[float]:
    """Train for `steps` rows; returns the losses."""
    losses = []
    for number, forward in zip(range(steps), rows, strict=False):
        losses.append(fit.step(number, forward))
        if (number + 1) % max(1, steps // 10) == 0:
            log.info("predictor: step %d, loss %.4f, %d neurons removed", number + 1, losses[-1], fit.removed)
    return losses
