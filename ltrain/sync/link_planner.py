"""From what the ranks tell with their frames to the plan of the next rounds."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

from ltrain.config.sync import SparseLoCo
from ltrain.sync.adapt import Network, solve

Notes = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class _Round:
    """Seconds that a finished round took: of a local step by replica, and as in `Network`."""

    step_s: dict[str, float]
    own_s: float
    latency_s: float


class LinkPlanner:
    """Makes the plan that a round's record carries to all replicas (`Coordinator`).

    Plans every `every` rounds from the median of those since the plan before, so that a plan is judged by the
    rounds that it made. A round tells of the one before it: the first gives no plan.
    """

    def __init__(self, config: SparseLoCo, every: int = 5) -> None:
        self.config, self.every = config, every
        self._round = 0
        self._seen: deque[_Round] = deque(maxlen=every)
        self._sizes: dict[str, float] = {}

    def __call__(self, notes: Notes) -> dict[str, Any] | None:
        """The plan of the next rounds, or None to go on as before; notes: of every rank, by replica."""
        self._round += 1
        try:
            return self._plan(notes)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
            # A replica whose notes cannot be used leaves the plan as it is.
            return None

    def _plan(self, notes: Notes) -> dict[str, Any] | None:
        links = _links(notes)
        replicas = sorted(notes)
        if len(replicas) < 2 or any((a, b) not in links for a in replicas for b in replicas if a != b):
            return None
        # What a replica can send or take in all is at least its best single link.
        up = {r: max(links[r, other] for other in replicas if other != r) for r in replicas}
        down = {r: max(links[other, r] for other in replicas if other != r) for r in replicas}
        self._observe(notes, Network({}, up, down))
        seen = [past for past in self._seen if past.step_s.keys() == notes.keys()]
        if not seen or (self._round - 1) % self.every:
            return None
        network = Network(
            {r: statistics.median(past.step_s[r] for past in seen) for r in replicas},
            up,
            down,
            own_s=statistics.median(past.own_s for past in seen),
            latency_s=statistics.median(past.latency_s for past in seen),
        )
        entries = max(sum(int(note["entries"]) for note in ranks) for ranks in notes.values())
        decision = solve(self.config, entries, network)
        return {
            "steps": decision.steps,
            "density": {r: c.density for r, c in decision.choices.items()},
            "bits": {r: c.bits for r, c in decision.choices.items()},
            "reason": decision.reason,
        }

    def _observe(self, notes: Notes, links: Network) -> None:
        sizes, self._sizes = self._sizes, {r: float(sum(n["frame_bytes"] for n in notes[r])) for r in notes}
        told = [note for ranks in notes.values() for note in ranks]
        if sizes.keys() != notes.keys() or any(note["round_s"] <= 0.0 for note in told):
            return
        transfer_s = max(links.exchange_s(sizes).values())
        self._seen.append(
            _Round(
                {r: max(_seconds(note, "step_s") for note in ranks) for r, ranks in notes.items()},
                own_s=max(_seconds(note, "round_s") - _seconds(note, "wait_s") for note in told),
                # Whoever came last waited for nobody: only for the transfers and the record.
                latency_s=max(0.0, min(_seconds(note, "wait_s") for note in told) - transfer_s),
            )
        )


def _seconds(note: dict[str, Any], name: str) -> float:
    value = float(note[name])
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name}={value} is no time")
    return value


def _links(notes: Notes) -> dict[tuple[str, str], float]:
    """Goodput in bytes/s by (sender, receiver): the best that a rank has measured."""
    links: dict[tuple[str, str], float] = {}
    for receiver, ranks in notes.items():
        for note in ranks:
            for sender, speed in note["links"].items():
                if sender in notes and 0.0 < float(speed) < math.inf:
                    links[sender, receiver] = max(float(speed), links.get((sender, receiver), 0.0))
    return links
