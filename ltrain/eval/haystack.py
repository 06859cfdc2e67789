"""Text that says nothing to the point, and facts hidden in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ltrain.eval.words import ADJECTIVES, NOUNS, TOWNS, VERBS

NOISE = (
    "The rain falls on the roof. The road leads over the hill. A door stands open. "
    "The lamp burns low. Night comes and goes."
)


def sentence(rng: np.random.Generator) -> str:
    """A sentence of filler."""
    first, second, third = rng.choice(NOUNS, 3)
    adjective, town = rng.choice(ADJECTIVES), rng.choice(TOWNS)
    form = int(rng.integers(4))
    if form == 0:
        return f"The {adjective} {first} near {town} {rng.choice(VERBS)} the {second}."
    if form == 1:
        return f"Nobody in {town} {rng.choice(VERBS)} the {first} or the {adjective} {second}."
    if form == 2:
        return f"Every {first} {rng.choice(VERBS)} a {second} when the {third} is {adjective}."
    return f"In {town} the {first} {rng.choice(VERBS)} what the {adjective} {second} {rng.choice(VERBS)}."


def filler(rng: np.random.Generator, count: int) -> list[str]:
    """`count` sentences."""
    return [sentence(rng) for _ in range(count)]


def noise(count: int) -> list[str]:
    """One short passage `count` times: a haystack that holds no information at all."""
    return [NOISE] * count


def hide(
    rng: np.random.Generator, hay: Sequence[str], facts: Sequence[str], depths: Sequence[float] | None = None
) -> list[str]:
    """The hay with every fact between two of its pieces, in random order, or at the given depths (0: before
    all hay, 1: after it).
    """
    if depths is None:
        places = rng.integers(0, len(hay) + 1, len(facts))
    else:
        places = np.array([round(depth * len(hay)) for depth in depths])
    lines: list[str] = []
    for i in range(len(hay) + 1):
        lines += [fact for fact, place in zip(facts, places, strict=True) if place == i]
        lines += hay[i : i + 1]
    return lines
