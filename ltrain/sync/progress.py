"""What a local step is worth: the progress of a run by local steps a round and density.

Two things make a local step worth less than one that is exchanged at once.

Starved coordinates: at density d a coordinate waits for n = 1/d rounds if all are sent equally often, and
error feedback forgets within 1 / (1 - error_decay) of them. Until then it collects drift, which grows with
the steps H of a round, and noise, which grows with their root. Where n is large beside sqrt(H), the largest
entries are noise and the drift of the others decays unsent: short rounds need a denser exchange.

Drift apart: replicas that train long alone end in different places, whose mean is worth less than either.

Form and constants are fitted (`tools/bench/sync_progress_fit.py`, docs/benchmarks/sync.md) to training runs
of 1 to 120 steps a round and 16 to 256 of 4096, with `senders`, `gain: 1.0` and the default error decay.
"""

from __future__ import annotations

import math

# n / sqrt(H) at which half of the progress is left, the power with which it falls, and the local steps that
# leave 1/e of it.
STARVED_AT = 26.0
STARVED_POWER = 3.0
DRIFT_STEPS = 145.0


def step_worth(steps: int, density: float) -> float:
    """Progress of one of `steps` local steps, as a share of that of a step with a dense exchange after it."""
    wait = 1.0 / (density * math.sqrt(steps))
    starved = 1.0 + (wait / STARVED_AT) ** STARVED_POWER
    return math.exp(-(steps - 1) / DRIFT_STEPS) / starved
