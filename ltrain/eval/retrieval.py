"""Needles in haystacks: the retrieval tasks that RULER defines (arXiv 2404.06654, section 3.1).

The eight variants follow the definition: what the haystack is, what keys and values look like, how many keys,
values per key and queries there are. Words and sentences are our own, so scores compare models with one
another, not with published figures; for those, use lm-eval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ltrain.eval import haystack
from ltrain.eval.sample import Sample, Task, Turn
from ltrain.eval.words import distinct, identifier, key, number

MAKERS: dict[str, Callable[[np.random.Generator], str]] = {
    "word": key,
    "number": number,
    "uuid": identifier,
}
KINDS = {"number": "number", "uuid": "id", "word": "word"}


@dataclass(frozen=True)
class Needles:
    """A variant: its haystack, the forms of key and value, and the numbers of keys, values and queries.

    With hay `needles` the haystack is made of further needles that nobody asks for. `depth`, if given, is
    where the needles stand (0 to 1).
    """

    hay: Literal["noise", "filler", "needles"]
    key_form: Literal["word", "uuid"] = "word"
    value_form: Literal["number", "uuid"] = "number"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1
    depth: float | None = None

    def __call__(self, rng: np.random.Generator, size: int) -> Sample:
        extra = size if self.hay == "needles" else 0
        keys = distinct(rng, MAKERS[self.key_form], self.num_keys + extra)
        values = distinct(rng, MAKERS[self.value_form], self.num_keys * self.num_values + extra)
        kind = KINDS[self.value_form]
        asked: dict[str, list[str]] = {}
        needles = []
        for i in range(self.num_keys):
            asked[keys[i]] = values[i * self.num_values : (i + 1) * self.num_values]
            needles += [_needle(kind, keys[i], value) for value in asked[keys[i]]]
        if self.hay == "needles":
            spare = values[self.num_keys * self.num_values :]
            hay = [_needle(kind, k, v) for k, v in zip(keys[self.num_keys :], spare, strict=True)]
        else:
            hay = haystack.noise(size) if self.hay == "noise" else haystack.filler(rng, size)
        depths = None if self.depth is None else [self.depth] * len(needles)
        text = "\n".join(haystack.hide(rng, hay, needles, depths))
        queried = list(asked)[: self.num_queries]
        answers = tuple(value for k in queried for value in asked[k])
        plural = "s" if len(answers) > 1 else ""
        names = ", ".join(queried)
        context = f"Some secret {kind}s are hidden in the text below. Remember them.\n\n{text}\n\n"
        question = (
            f"Question: which secret {kind}{plural} of {names} did the text give?\n"
            f"Answer: the secret {kind}{plural} of {names}:"
        )
        return Sample(context, (Turn(question, answers),))


def _needle(kind: str, name: str, value: str) -> str:
    return f"A secret {kind} of {name} is: {value}."


TASKS = (
    Task("niah_single_1", Needles("noise")),
    Task("niah_single_2", Needles("filler")),
    Task("niah_single_3", Needles("filler", value_form="uuid")),
    Task("niah_multikey_1", Needles("filler", num_keys=4)),
    Task("niah_multikey_2", Needles("needles")),
    Task("niah_multikey_3", Needles("needles", key_form="uuid", value_form="uuid")),
    Task("niah_multivalue", Needles("filler", num_values=4)),
    Task("niah_multiquery", Needles("filler", num_keys=4, num_queries=4)),
)
