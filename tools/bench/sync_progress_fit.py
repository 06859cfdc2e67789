"""The constants of ltrain/sync/progress.py from the losses that sync_progress.py wrote.

python tools/bench/sync_progress_fit.py [docs/benchmarks/sync_progress.csv]

The loss of every-step training is described as a - b log(steps + c). What a local step of another run is
worth is the factor on its steps that brings its losses onto this curve, from step 100 on, when error
feedback has filled. Then the constants that come nearest to all of these, by least squares, up to a common
factor: it is the same for all choices.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FROM_STEP = 100
ROOTS, POWERS = (0.25, 0.5, 0.75, 1.0), (2.0, 3.0, 4.0)


@dataclass(frozen=True)
class Worth:
    """Of a local step of one run, beside every-step training of the same seed; `rounds` between two sends."""

    seed: str
    steps: int
    rounds: float
    measured: float


@dataclass(frozen=True)
class Fit:
    """measured = scale * exp(-(steps - 1) / drift) / (1 + (rounds / steps^root / starved)^power)."""

    root: float
    power: float
    starved: float
    drift: float
    scale: float
    error: float

    def __call__(self, worth: Worth) -> float:
        wait = worth.rounds / worth.steps**self.root / self.starved
        return float(self.scale * np.exp(-(worth.steps - 1) / self.drift) / (1.0 + wait**self.power))


def read(path: Path) -> list[Worth]:
    """What a step of every run in the file is worth; seeds without every-step training are left out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    curves = {
        (row["seed"], int(row["steps_per_round"]), int(row["k"])): np.array(
            [[float(x) for x in point.split(":")] for point in row["curve"].split()]
        )
        for row in rows
    }
    found = []
    for (seed, steps, _), curve in curves.items():
        if steps == 0:
            reference = _describe(curve[curve[:, 0] > 10])
            found += [
                Worth(seed, h, 4096 / k, _align(other[other[:, 0] >= FROM_STEP], *reference))
                for (of, h, k), other in curves.items()
                if of == seed and h
            ]
    return sorted(found, key=lambda worth: (worth.seed, worth.rounds, worth.steps))


def _describe(curve: np.ndarray) -> tuple[float, float, float]:
    """(a, b, c) of loss = a - b log(steps + c)."""
    best = (np.inf, 0.0, 0.0, 0.0)
    for c in np.geomspace(10.0, 5000.0, 300):
        terms = np.stack([np.ones(len(curve)), -np.log(curve[:, 0] + c)], axis=1)
        (a, b), *_ = np.linalg.lstsq(terms, curve[:, 1], rcond=None)
        best = min(best, (float(((terms @ (a, b) - curve[:, 1]) ** 2).sum()), a, b, c))
    return best[1:]


def _align(curve: np.ndarray, a: float, b: float, c: float) -> float:
    factors = np.geomspace(0.02, 3.0, 1000)[:, None]
    errors = ((a - b * np.log(factors * curve[:, 0] + c) - curve[:, 1]) ** 2).mean(axis=1)
    return float(factors[int(errors.argmin()), 0])


def fit(worths: list[Worth], root: float, power: float) -> Fit:
    """The best constants of one form."""
    steps, rounds, measured = (
        np.array([getattr(worth, name) for worth in worths]) for name in ("steps", "rounds", "measured")
    )
    starved, drift = np.geomspace(1, 300, 200)[:, None, None], np.geomspace(20, 2000, 150)[None, :, None]
    model = np.exp(-(steps - 1) / drift) / (1.0 + (rounds / steps**root / starved) ** power)
    scale = (model * measured).sum(-1, keepdims=True) / (model**2).sum(-1, keepdims=True)
    error = ((scale * model - measured) ** 2).sum(-1)
    i, j = np.unravel_index(int(error.argmin()), error.shape)
    rms = float(np.sqrt(error[i, j] / len(worths)))
    return Fit(root, power, float(starved[i, 0, 0]), float(drift[0, j, 0]), float(scale[i, j, 0]), rms)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", default=Path("docs/benchmarks/sync_progress.csv"))
    worths = read(parser.parse_args().file)
    print("| power of H | power of the wait | starved at | drift | scale | rms error |\n" + "|---" * 6 + "|")
    for root, power in itertools.product(ROOTS, POWERS):
        found = fit(worths, root, power)
        print(
            f"| {root} | {power:.0f} | {found.starved:.1f} | {found.drift:.0f} | {found.scale:.2f} "
            f"| {found.error:.3f} |"
        )
    taken = fit(worths, 0.5, 3.0)
    print("\n| k of 4096 | steps a round (H) | a step is worth, by seed | model |\n|---|---|---|---|")
    for (rounds, steps), group in itertools.groupby(
        sorted(worths, key=lambda worth: (worth.rounds, worth.steps)),
        key=lambda worth: (worth.rounds, worth.steps),
    ):
        same = list(group)
        measured = " ".join(f"{worth.measured:.2f}" for worth in same)
        print(f"| {4096 / rounds:.0f} | {steps} | {measured} | {taken(same[0]):.2f} |")


if __name__ == "__main__":
    main()
