"""Correcting the cost model from measured group times."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.cost import CostModel
from ltrain.planner.evaluate import group_seconds
from ltrain.planner.plan import Plan


class OnlineCalibration:
    """Fits four multipliers, of attention, linear, exchange and fixed time, to the latest measured groups.

    Ridge regression towards 1 on relative errors, over the last `window` groups: with few or similar groups
    the model stays near the one it was given, and terms that the data can't tell apart share the correction.
    Multipliers stay in [0.02, 50].
    """

    def __init__(
        self, cluster: ClusterSpec, cost: CostModel, *, window: int = 512, strength: float = 0.002
    ) -> None:
        if window < 1:
            raise ConfigError("planner.calibration_window", window, "must be at least 1")
        self._cluster, self._base = cluster, cost
        self._strength = strength
        self._rows: deque[tuple[float, ...]] = deque(maxlen=window)
        self._measured: deque[float] = deque(maxlen=window)
        self.multipliers = np.ones(4)

    @property
    def cost(self) -> CostModel:
        """The corrected model."""
        attention, linear, exchange, fixed = (float(value) for value in self.multipliers)
        return self._base.scaled(attention, linear, fixed, exchange)

    def observe(self, plan: Plan, measured_s: Sequence[Sequence[float]]) -> None:
        """Take in seconds for every group of every micro-batch of `plan`, in its order, and fit anew.

        Times that are not positive are skipped: a group whose time was not taken. Raises ValueError on
        another shape.
        """
        shape = [len(groups) for groups in plan.micro_batches]
        if [len(times) for times in measured_s] != shape:
            raise ValueError(f"measured_s must have {shape} times, one a group")
        for groups, times in zip(plan.micro_batches, measured_s, strict=True):
            for group, seconds in zip(groups, times, strict=True):
                if not (seconds > 0 and np.isfinite(seconds)):
                    continue
                terms = group_seconds(group, plan.lengths, self._cluster, self._base)
                self._rows.append((terms.attention, terms.linear, terms.exchange, terms.fixed))
                self._measured.append(seconds)
        if self._rows:
            self._fit()

    def state_dict(self) -> dict[str, Any]:
        """The window, plain JSON."""
        return {"rows": [list(row) for row in self._rows], "measured": list(self._measured)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another calibration's window, made with the same cluster and cost model."""
        self._rows.clear()
        self._measured.clear()
        self._rows.extend(tuple(float(value) for value in row) for row in state["rows"])
        self._measured.extend(float(value) for value in state["measured"])
        self.multipliers = np.ones(4)
        if self._rows:
            self._fit()

    def predicted_over_measured(self) -> float:
        """Median over the window of predicted over measured seconds, under the corrected model; nan without
        data."""
        if not self._rows:
            return float("nan")
        return float(np.median(np.array(self._rows) @ self.multipliers / np.array(self._measured)))

    def _fit(self) -> None:
        measured = np.array(self._measured)
        rows = np.array(self._rows) / measured[:, None]
        # Scale first: one common factor is what a slower machine looks like, and needs no regression.
        common = 1.0 / float(np.median(rows.sum(axis=1)))
        scaled = rows * common
        penalty = self._strength * len(measured)
        gram = scaled.T @ scaled + penalty * np.eye(4)
        target = scaled.T @ np.ones(len(measured)) + penalty * np.ones(4)
        self.multipliers = np.clip(np.linalg.solve(gram, target) * common, 0.02, 50.0)
