"""Choose local steps, density and bits from measured links: a small integer program, and its reasons.

The objective is a loss in nats: so much for every doubling of the local steps and of the sparsity, so much
for the time that the exchange adds to a step. The weights are set beside losses of a small model
(docs/benchmarks/sync.md): they order choices, they predict no loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ltrain.config.sync import SparseLoCo

_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 240)
# Nats for each doubling of the local steps, and of the rounds between two sends of a coordinate.
_STEPS_PENALTY = 0.02
_DENSITY_PENALTY = 0.01
_TWO_BIT_BONUS = 0.001
# Nats for every compute time of a step that the exchange adds to it.
_TIME_PENALTY = 0.1
# No replica may send more than this many times what another sends: the mean would follow the denser ones.
_MAX_RATIO = 4.0


@dataclass(frozen=True)
class Choice:
    """A codec, and its bytes for the whole model."""

    density: float
    bits: int
    nbytes: float


@dataclass(frozen=True)
class Decision:
    """What `solve` found: steps for all, a choice by replica, the predicted time, and the reasons."""

    steps: int
    choices: dict[str, Choice]
    round_s: float
    reason: str


def frame_bytes(entries: int, density: float, bits: int, chunk: int) -> float:
    """Bytes of a frame: Rice-coded indices (entropy bound + 2.6 %), values, a scale a chunk for signs."""
    k = max(1, round(density * chunk))
    if k >= chunk:
        index = 0.0
    else:
        entropy = math.lgamma(chunk + 1) - math.lgamma(k + 1) - math.lgamma(chunk - k + 1)
        index = 1.026 * entropy / math.log(2) / k
    values = entries * k / chunk
    scales = 16.0 / k if bits == 1 else 0.0
    return values * (index + bits + scales) / 8.0


def choices_for(config: SparseLoCo, entries: int) -> list[Choice]:
    """The codecs between `min_density` and `density`, by halves; one and two bits, or the given width."""
    densities, density = [], config.density
    while density >= config.min_density * 0.999:
        densities.append(density)
        density /= 2
    widths = sorted({1, 2} if config.bits <= 2 else {1, 2, config.bits})
    return [Choice(d, b, frame_bytes(entries, d, b, config.chunk)) for d in densities for b in widths]


def solve(
    config: SparseLoCo,
    *,
    entries: int,
    step_s: dict[str, float],
    up_bytes_s: dict[str, float],
    down_bytes_s: dict[str, float],
    fixed_s: float = 0.0,
) -> Decision:
    """Maximise modelled progress subject to a round, compute and exchange, within `target_round_s`.

    step_s: seconds of an inner step by replica; up_bytes_s, down_bytes_s: goodput of its links; entries:
    parameters of the model; fixed_s: time of a round whatever its size. A replica sends its frame to each
    other replica over its uplink and receives theirs over its downlink; both run at once, during compute when
    rounds overlap. When no choice meets the target, the fastest round is taken and the reason says so.
    """
    # Only the rendezvous service solves: replicas need no solver.
    import pulp

    replicas = sorted(step_s)
    options = choices_for(config, entries)
    steps = [h for h in _STEPS if config.steps_per_round <= h <= config.max_steps_per_round]
    steps = sorted({config.steps_per_round, *steps})
    assert config.target_round_s is not None
    problem = pulp.LpProblem("sync", pulp.LpMinimize)
    pick = {
        (r, i): pulp.LpVariable(f"codec_{n}_{i}", cat="Binary")
        for n, r in enumerate(replicas)
        for i in range(len(options))
    }
    take = {h: pulp.LpVariable(f"steps_{h}", cat="Binary") for h in steps}
    over = pulp.LpVariable("over", lowBound=0)
    exchange_s = pulp.LpVariable("exchange_s", lowBound=0)
    problem += pulp.lpSum(take.values()) == 1
    nbytes = {}
    for r in replicas:
        problem += pulp.lpSum(pick[r, i] for i in range(len(options))) == 1
        nbytes[r] = pulp.lpSum(option.nbytes * pick[r, i] for i, option in enumerate(options))
    for r in replicas:
        problem += exchange_s >= nbytes[r] * ((len(replicas) - 1) / up_bytes_s[r])
        others = pulp.lpSum(nbytes[other] for other in replicas if other != r)
        problem += exchange_s >= others * (1.0 / down_bytes_s[r])
    slowest_s = max(step_s.values())
    compute_s = pulp.lpSum(h * slowest_s * take[h] for h in steps)
    if config.overlap == "none":
        problem += compute_s + exchange_s + fixed_s <= config.target_round_s + over
    else:
        problem += compute_s <= config.target_round_s + over
        problem += exchange_s <= config.target_round_s + over
    for i, a in enumerate(options):
        for j, b in enumerate(options):
            if a.density > _MAX_RATIO * b.density * 1.001:
                for r in replicas:
                    for other in replicas:
                        if r != other:
                            problem += pick[r, i] + pick[other, j] <= 1
    # exchange_s / H is a product: one variable for every H, that counts only where this H is taken.
    longest = (
        max(o.nbytes for o in options) * len(replicas) / min([*up_bytes_s.values(), *down_bytes_s.values()])
    )
    added_s = []
    for h in steps:
        share = pulp.LpVariable(f"exchange_s_{h}", lowBound=0)
        problem += share >= exchange_s - longest * (1 - take[h])
        hidden = h * slowest_s if config.overlap == "delayed" else 0.0
        beyond = pulp.LpVariable(f"beyond_s_{h}", lowBound=0)
        problem += beyond >= share + (fixed_s - hidden) * take[h]
        added_s.append(beyond * (1.0 / (h * slowest_s)))
    lost = pulp.lpSum(
        [_STEPS_PENALTY * math.log2(h / steps[0]) * take[h] for h in steps]
        + [
            _codec_penalty(o, config) / len(replicas) * pick[r, i]
            for r in replicas
            for i, o in enumerate(options)
        ]
    )
    problem += lost + _TIME_PENALTY * pulp.lpSum(added_s) + 1e4 * over * (1.0 / config.target_round_s)
    problem.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=10))
    chosen_steps = max(steps, key=lambda h: take[h].value() or 0.0)
    chosen = {r: options[max(range(len(options)), key=lambda i: pick[r, i].value() or 0.0)] for r in replicas}
    return _explain(config, chosen_steps, chosen, step_s, up_bytes_s, down_bytes_s, fixed_s)


def _codec_penalty(option: Choice, config: SparseLoCo) -> float:
    rarer = math.log2(config.density / option.density)
    return _DENSITY_PENALTY * rarer - (_TWO_BIT_BONUS if option.bits == 2 else 0.0)


def exchange_times(
    nbytes: dict[str, float], up_bytes_s: dict[str, float], down_bytes_s: dict[str, float]
) -> dict[str, float]:
    """Seconds that each replica's links need for a round of these frames."""
    total = sum(nbytes.values())
    return {
        r: max((len(nbytes) - 1) * nbytes[r] / up_bytes_s[r], (total - nbytes[r]) / down_bytes_s[r])
        for r in nbytes
    }


def _explain(
    config: SparseLoCo,
    steps: int,
    chosen: dict[str, Choice],
    step_s: dict[str, float],
    up_bytes_s: dict[str, float],
    down_bytes_s: dict[str, float],
    fixed_s: float,
) -> Decision:
    times = exchange_times({r: c.nbytes for r, c in chosen.items()}, up_bytes_s, down_bytes_s)
    compute_s = steps * max(step_s.values())
    slowest = max(times, key=lambda r: times[r])
    round_s = (
        compute_s + times[slowest] + fixed_s if config.overlap == "none" else max(compute_s, times[slowest])
    )
    codecs = ", ".join(f"{r} {c.density:.4f} at {c.bits} bit" for r, c in chosen.items())
    reason = (
        f"{steps} steps ({compute_s:.1f} s), {codecs}; the exchange takes "
        f"{times[slowest]:.1f} + {fixed_s:.1f} s, bound by {slowest} (up {8e-6 * up_bytes_s[slowest]:.0f}, "
        f"down {8e-6 * down_bytes_s[slowest]:.0f} Mbit/s)"
    )
    assert config.target_round_s is not None
    if round_s > config.target_round_s * 1.001:
        reason += f"; no choice meets target_round_s={config.target_round_s:g}, this is the fastest round"
    return Decision(steps, chosen, round_s, reason)


class LinkPlanner:
    """Turns the notes that ranks send with their frames into the plan of the next rounds (`Coordinator`).

    Plans again every `every` rounds, so that a plan is judged by the rounds that it made.
    """

    def __init__(self, config: SparseLoCo, every: int = 5) -> None:
        self.config, self.every = config, every
        self._round = 0

    def __call__(self, notes: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
        self._round += 1
        if (self._round - 1) % self.every:
            return None
        try:
            return self._plan(notes)
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
            # A replica whose notes cannot be used leaves the plan as it is.
            return None

    def _plan(self, notes: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
        links: dict[tuple[str, str], float] = {}
        for receiver, ranks in notes.items():
            for note in ranks:
                for sender, speed in note["links"].items():
                    if sender in notes and float(speed) > 0:
                        links[sender, receiver] = max(float(speed), links.get((sender, receiver), 0.0))
        replicas = sorted(notes)
        if len(replicas) < 2 or any((a, b) not in links for a in replicas for b in replicas if a != b):
            return None
        # What a replica can send or take in all is at least its best single link.
        up = {r: max(links[r, other] for other in replicas if other != r) for r in replicas}
        down = {r: max(links[other, r] for other in replicas if other != r) for r in replicas}
        sizes = {r: float(sum(note["frame_bytes"] for note in notes[r])) for r in replicas}
        exchange = max(exchange_times(sizes, up, down).values())
        decision = solve(
            self.config,
            entries=int(max(sum(note["entries"] for note in ranks) for ranks in notes.values())),
            step_s={r: max(float(note["step_s"]) for note in notes[r]) for r in replicas},
            up_bytes_s=up,
            down_bytes_s=down,
            # What the last rounds took beyond their bytes: coding, waiting, applying.
            fixed_s=max(
                0.0, min(float(note["round_s"]) for ranks in notes.values() for note in ranks) - exchange
            ),
        )
        return {
            "steps": decision.steps,
            "density": {r: c.density for r, c in decision.choices.items()},
            "bits": {r: c.bits for r, c in decision.choices.items()},
            "reason": decision.reason,
        }
