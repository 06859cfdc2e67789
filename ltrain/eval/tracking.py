"""Following chains of assignments: RULER's variable tracking (arXiv 2404.06654, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np

from ltrain.eval import haystack
from ltrain.eval.sample import Sample, Task, Turn
from ltrain.eval.words import distinct


def _variable(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(ascii_uppercase), 5))


def _value(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))


@dataclass(frozen=True)
class VariableTracking:
    """`num_chains` chains, each a value that is handed on over `num_hops` assignments; asked is for every
    variable that holds the value of each of the first `num_asked` chains, a turn each. Assignments of a chain
    stand in their order, noise and those of other chains between them.
    """

    num_chains: int = 1
    num_hops: int = 4
    num_asked: int = 1

    def __call__(self, rng: np.random.Generator, size: int) -> Sample:
        return Sample(*self.parts(rng, size))

    def parts(self, rng: np.random.Generator, size: int) -> tuple[str, tuple[Turn, ...]]:
        """The context, and a turn for each chain that is asked for."""
        length = self.num_hops + 1
        names = distinct(rng, _variable, self.num_chains * length)
        values = distinct(rng, _value, self.num_chains)
        hay = haystack.noise(size)
        lines: list[tuple[float, int, str]] = [(i + 1.0, 0, piece) for i, piece in enumerate(hay)]
        for c in range(self.num_chains):
            chain = names[c * length : (c + 1) * length]
            sources = [values[c], *(f"VAR {name}" for name in chain[:-1])]
            places = np.sort(rng.uniform(0.5, size + 1.5, length))
            lines += [
                (float(place), i + 1, f"VAR {name} = {source}")
                for i, (place, name, source) in enumerate(zip(places, chain, sources, strict=True))
            ]
        text = "\n".join(line for *_, line in sorted(lines))
        context = f"Variables are assigned in the text below. Follow the assignments.\n\n{text}\n\n"
        turns = tuple(
            Turn(
                f"Question: which variables hold the value {value}?\n"
                f"Answer: these {length} variables hold the value {value}:",
                tuple(names[c * length : (c + 1) * length]),
            )
            for c, value in enumerate(values[: self.num_asked])
        )
        return context, turns


TASKS = (Task("vt", VariableTracking()),)
