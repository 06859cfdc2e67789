"""Several questions over one context whose cache is kept: retrieval as SCBench has it (arXiv 2412.10319).

In `kv_turns` a session goes on, every question sees the earlier ones; in `kv_requests` every question starts
from the context alone. Earlier questions are answered by their references, so that turns are scored apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ltrain.eval.sample import Sample, Task, Turn
from ltrain.eval.words import distinct, identifier


@dataclass(frozen=True)
class KeyValues:
    """A JSON-like table of `size` random ids to random ids, looked up `num_turns` times."""

    history: bool
    num_turns: int = 5

    def __call__(self, rng: np.random.Generator, size: int) -> Sample:
        keys = distinct(rng, identifier, size)
        values = distinct(rng, identifier, size)
        table = ",\n".join(f'"{k}": "{v}"' for k, v in zip(keys, values, strict=True))
        asked = rng.permutation(size)[: self.num_turns]
        turns = tuple(Turn(f'Question: the value of "{keys[i]}"?\nAnswer:', (values[i],)) for i in asked)
        return Sample(f"A table of keys and values:\n{{{table}}}\n\n", turns, self.history)


TASKS = (
    Task("kv_turns", KeyValues(history=True), smallest=5),
    Task("kv_requests", KeyValues(history=False), smallest=5),
)
