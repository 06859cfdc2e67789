"""Choose local steps, density and bits from measured links: a small integer program, and its reasons.

What is maximised is progress per second: the local steps of a round, each by its worth
(`progress.step_worth`), over the seconds of the round: local steps, transfers, and the replicas' own work on
the exchange.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ltrain.config.sync import SparseLoCo
from ltrain.sync.progress import step_worth

_STEPS = (1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240)
# No replica may send more than this many times what another sends: the mean would follow the denser ones.
_MAX_RATIO = 4.0
# A target that cannot be met becomes so many times the fastest round.
_SLACK = 1.1


@dataclass(frozen=True)
class Choice:
    """A codec, and its bytes for the whole model."""

    density: float
    bits: int
    nbytes: float


@dataclass(frozen=True)
class Network:
    """What is known of the replicas: by name, seconds of a local step and goodput of the links in bytes/s.

    own_s: seconds of a round in which the slowest replica compresses, encodes and applies; latency_s: seconds
    of its wait beyond the transfers, whatever their size.
    """

    step_s: dict[str, float]
    up_bytes_s: dict[str, float]
    down_bytes_s: dict[str, float]
    own_s: float = 0.0
    latency_s: float = 0.0

    def exchange_s(self, nbytes: dict[str, float]) -> dict[str, float]:
        """Seconds that each replica's links need for a round of these frames.

        A replica sends its frame to each other replica over its uplink and receives theirs over its downlink.
        """
        total = sum(nbytes.values())
        return {
            r: max((len(nbytes) - 1) * size / self.up_bytes_s[r], (total - size) / self.down_bytes_s[r])
            for r, size in nbytes.items()
        }

    @property
    def slowest_step_s(self) -> float:
        return max(self.step_s.values())

    def round_s(self, steps: int, exchange_s: float, *, overlapped: bool) -> float:
        """Seconds of a round; when overlapped, transfers run beside the local steps."""
        local_s, away_s = steps * self.slowest_step_s, exchange_s + self.latency_s
        return self.own_s + (max(local_s, away_s) if overlapped else local_s + away_s)


@dataclass(frozen=True)
class Decision:
    """Steps for all, a choice by replica, the predicted time of a round, and why.

    progress_s: progress per second, in steps with a dense exchange after each.
    """

    steps: int
    choices: dict[str, Choice]
    round_s: float
    progress_s: float
    reason: str = ""


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
    """The codecs between `min_density` and `density`, by halves, densest first.

    One and two bits are equal in quality (docs/benchmarks/sync.md): where `bits` is either, each density has
    the one of fewer bytes. Wider values are kept.
    """
    widths = (1, 2) if config.bits <= 2 else (config.bits,)
    found, density = [], config.density
    while density >= config.min_density * 0.999:
        sizes = {bits: frame_bytes(entries, density, bits, config.chunk) for bits in widths}
        bits = min(widths, key=sizes.__getitem__)
        found.append(Choice(density, bits, sizes[bits]))
        density /= 2
    return found


def solve(config: SparseLoCo, entries: int, network: Network) -> Decision:
    """Maximise progress per second over rounds within `target_round_s`; entries: parameters of the model.

    A target that no choice meets is relaxed to just above the fastest round, and the reason says so.
    """
    assert config.target_round_s is not None
    options = choices_for(config, entries)
    steps = sorted(
        {config.steps_per_round}
        | {h for h in _STEPS if config.steps_per_round <= h <= config.max_steps_per_round}
    )
    # The same codec for all, by enumeration; replicas that differ, by the program.
    uniform = [
        judge(config, network, h, dict.fromkeys(network.step_s, option)) for h in steps for option in options
    ]
    fastest = min(uniform, key=lambda decision: decision.round_s)
    limit_s = config.target_round_s if fastest.round_s <= config.target_round_s else _SLACK * fastest.round_s
    best = max((d for d in uniform if d.round_s <= limit_s), key=lambda decision: decision.progress_s)
    # A ratio is maximised by a few linear programs (Dinkelbach): the best of progress - rate * seconds beats
    # `rate`, until it is the best one.
    while found := _better(config, network, options, steps, best.progress_s, limit_s):
        if found.progress_s <= best.progress_s * (1.0 + 1e-6):
            break
        best = found
    return replace(best, reason=_reason(config, network, best, steps))


def judge(config: SparseLoCo, network: Network, steps: int, choices: dict[str, Choice]) -> Decision:
    """The decision to take these steps and codecs, without its reason."""
    exchange_s = max(network.exchange_s({r: c.nbytes for r, c in choices.items()}).values())
    round_s = network.round_s(steps, exchange_s, overlapped=config.overlap == "delayed")
    worth = sum(step_worth(steps, c.density) for c in choices.values()) / len(choices)
    return Decision(steps, choices, round_s, steps * worth / round_s)


def _better(
    config: SparseLoCo,
    network: Network,
    options: list[Choice],
    steps: list[int],
    rate: float,
    limit_s: float,
) -> Decision | None:
    """The decision with the largest progress - `rate` * seconds; None if none can reach `rate`."""
    # Only the rendezvous service solves: replicas need no solver.
    import pulp

    replicas, numbers = sorted(network.step_s), range(len(options))
    # Steps that would not do with the densest codec in the time of the sparsest need no variables.
    least_s = {h: judge(config, network, h, dict.fromkeys(replicas, options[-1])).round_s for h in steps}
    steps = [
        h
        for h in steps
        if least_s[h] <= limit_s and h * step_worth(h, options[0].density) > rate * least_s[h]
    ]
    if not steps:
        return None
    problem = pulp.LpProblem("sync", pulp.LpMaximize)
    take = {h: pulp.LpVariable(f"steps_{h}", cat="Binary") for h in steps}
    pick = {
        (r, i, h): pulp.LpVariable(f"codec_{n}_{i}_{h}", cat="Binary")
        for n, r in enumerate(replicas)
        for i in numbers
        for h in steps
    }
    used = [pulp.LpVariable(f"used_{i}", cat="Binary") for i in numbers]
    exchange_s = pulp.LpVariable("exchange_s", lowBound=0)
    round_s = pulp.LpVariable("round_s", lowBound=0, upBound=limit_s)
    progress = pulp.lpSum(
        h * step_worth(h, options[i].density) / len(replicas) * chosen for (_, i, h), chosen in pick.items()
    )
    problem += progress - rate * round_s
    problem += pulp.lpSum(take.values()) == 1
    for r in replicas:
        for h in steps:
            problem += pulp.lpSum(pick[r, i, h] for i in numbers) == take[h]
        for i in numbers:
            problem += pulp.lpSum(pick[r, i, h] for h in steps) <= used[i]
    for i, dense in enumerate(options):
        for j, sparse in enumerate(options):
            if dense.density > _MAX_RATIO * sparse.density * 1.001:
                problem += used[i] + used[j] <= 1
    nbytes = {
        r: pulp.lpSum(options[i].nbytes * pick[r, i, h] for i in numbers for h in steps) for r in replicas
    }
    for r in replicas:
        others = pulp.lpSum(nbytes[other] for other in replicas if other != r)
        problem += exchange_s >= nbytes[r] * ((len(replicas) - 1) / network.up_bytes_s[r])
        problem += exchange_s >= others * (1.0 / network.down_bytes_s[r])
    local_s = pulp.lpSum(h * network.slowest_step_s * take[h] for h in steps)
    away_s = exchange_s + network.latency_s
    if config.overlap == "none":
        problem += round_s >= network.own_s + local_s + away_s
    else:
        problem += round_s >= network.own_s + local_s
        problem += round_s >= network.own_s + away_s
    problem.solve(pulp.PULP_CBC_CMD(msg=False, timeLimit=10))
    chosen_steps = max(steps, key=lambda h: take[h].value() or 0.0)
    chosen = {r: max(numbers, key=lambda i: pick[r, i, chosen_steps].value() or 0.0) for r in replicas}
    return judge(config, network, chosen_steps, {r: options[i] for r, i in chosen.items()})


def _reason(config: SparseLoCo, network: Network, best: Decision, steps: list[int]) -> str:
    """What was chosen, what the time goes to, and what the next fewer and more steps would give."""
    times = network.exchange_s({r: c.nbytes for r, c in best.choices.items()})
    slowest = max(times, key=lambda r: times[r])
    up, down = (8e-6 * links[slowest] for links in (network.up_bytes_s, network.down_bytes_s))
    codecs = ", ".join(f"{r} {c.density:.4f} at {c.bits} bit" for r, c in best.choices.items())
    rest_s, worth = network.own_s + network.latency_s, best.progress_s * best.round_s / best.steps
    at = steps.index(best.steps)
    others = steps[max(0, at - 1) : at] + steps[at + 1 : at + 2]
    beside = [judge(config, network, h, best.choices) for h in others]

    def share(decision: Decision) -> str:
        return f"{100 * network.slowest_step_s * decision.progress_s:.0f} %"

    reason = (
        f"{best.steps} steps ({best.steps * network.slowest_step_s:.1f} s), {codecs}; the exchange takes "
        f"{times[slowest]:.1f} + {rest_s:.1f} s, bound by {slowest} (up {up:.3g}, down {down:.3g} Mbit/s); "
        f"a step is worth {worth:.2f} of a dense one, and the run goes at {share(best)} of dense steps on "
        "free links"
    )
    if beside:
        reason += f" (with {', '.join(f'{d.steps} steps {share(d)}' for d in beside)})"
    assert config.target_round_s is not None
    if best.round_s > config.target_round_s * 1.001:
        reason += f"; no choice meets target_round_s={config.target_round_s:g}, this is near the fastest"
    return reason
