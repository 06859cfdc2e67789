"""Several questions over one context whose cache is kept: SCBench's shared contexts (arXiv 2412.10319).

Of its tasks those whose data can be made: Retr.KV, Retr.Prefix-Suffix, Retr.MultiHop, Math.Find, and QA over
made-up documents. Each comes in its two modes: with `_turns` a session goes on and every question sees the
earlier ones; with `_requests` every question starts from the context alone. Earlier questions are answered by
their references, so that turns are scored apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase, digits

import numpy as np

from ltrain.eval.questions import Documents
from ltrain.eval.sample import Metric, Sample, Task, Turn
from ltrain.eval.tracking import VariableTracking
from ltrain.eval.words import distinct, identifier

NUM_TURNS = 5

# From a generator and a size to the context and its turns.
Maker = Callable[[np.random.Generator, int], tuple[str, tuple[Turn, ...]]]


@dataclass(frozen=True)
class Shared:
    """A context with several turns; `history`: later ones see the earlier ones."""

    make: Maker
    history: bool

    def __call__(self, rng: np.random.Generator, size: int) -> Sample:
        context, turns = self.make(rng, size)
        return Sample(context, turns, self.history)


def key_values(rng: np.random.Generator, size: int) -> tuple[str, tuple[Turn, ...]]:
    """A JSON-like table of `size` random ids to random ids (Retr.KV)."""
    keys = distinct(rng, identifier, size)
    values = distinct(rng, identifier, size)
    table = ",\n".join(f'"{k}": "{v}"' for k, v in zip(keys, values, strict=True))
    asked = rng.permutation(size)[:NUM_TURNS]
    turns = tuple(Turn(f'Question: the value of "{keys[i]}"?\nAnswer:', (values[i],)) for i in asked)
    return f"A table of keys and values:\n{{{table}}}\n\n", turns


def prefix_suffix(rng: np.random.Generator, size: int) -> tuple[str, tuple[Turn, ...]]:
    """`size` strings of different lengths; the one with both a prefix and a suffix is asked for
    (Retr.Prefix-Suffix).

    Prefixes and suffixes are each shared by several strings, only a pair of both names one.
    """
    pool = max(2, math.isqrt(size - 1) + 1)
    heads, tails = (distinct(rng, lambda r: _letters(r, ascii_lowercase, 5), pool) for _ in range(2))
    pairs = [divmod(int(pair), pool) for pair in rng.permutation(pool * pool)[:size]]
    middles = [_letters(rng, ascii_lowercase + digits, int(rng.integers(8, 33))) for _ in pairs]
    strings = [heads[h] + middle + tails[t] for (h, t), middle in zip(pairs, middles, strict=True)]
    turns = []
    for i in rng.permutation(size)[:NUM_TURNS]:
        head, tail = heads[pairs[i][0]], tails[pairs[i][1]]
        question = f'Question: which string begins with "{head}" and ends with "{tail}"?\nAnswer:'
        turns.append(Turn(question, (strings[i],)))
    listed = "\n".join(strings)
    return f"A list of strings:\n{listed}\n\n", tuple(turns)


def _letters(rng: np.random.Generator, alphabet: str, count: int) -> str:
    return "".join(rng.choice(list(alphabet), count))


def multi_hop(rng: np.random.Generator, size: int) -> tuple[str, tuple[Turn, ...]]:
    """A chain of assignments for every turn, mixed in one text (Retr.MultiHop)."""
    return VariableTracking(num_chains=NUM_TURNS, num_asked=NUM_TURNS).parts(rng, size)


def math_find(rng: np.random.Generator, size: int) -> tuple[str, tuple[Turn, ...]]:
    """A list of `2 size + 1` different numbers: extremes, those next to them and the median (Math.Find)."""
    count = 2 * size + 1
    numbers = rng.choice(np.arange(10 * count, 20 * count), count, replace=False)
    ranked = np.sort(numbers)
    places = {"largest": -1, "smallest": 0, "second largest": -2, "second smallest": 1, "median": size}
    turns = tuple(
        Turn(f"Question: what is the {name} of the numbers?\nAnswer:", (str(ranked[place]),))
        for name, place in places.items()
    )
    order = rng.permutation(len(turns))
    listed = ", ".join(map(str, numbers))
    return f"A list of numbers:\n{listed}\n\n", tuple(turns[i] for i in order)


def questions(rng: np.random.Generator, size: int) -> tuple[str, tuple[Turn, ...]]:
    """Documents on `size` people more than the questions need: facts from one document and from two."""
    return Documents(num_hops=2, num_questions=NUM_TURNS).parts(rng, size)


_MAKERS: dict[str, tuple[Maker, Metric, int]] = {
    "kv": (key_values, "all", NUM_TURNS),
    "prefix_suffix": (prefix_suffix, "all", NUM_TURNS),
    "multi_hop": (multi_hop, "all", 1),
    "math_find": (math_find, "all", 2),
    "qa": (questions, "any", 0),
}
TASKS = tuple(
    Task(f"{name}_{mode}", Shared(make, mode == "turns"), metric, smallest)
    for name, (make, metric, smallest) in _MAKERS.items()
    for mode in ("turns", "requests")
)
