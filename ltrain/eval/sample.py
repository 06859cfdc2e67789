"""A question over a long context, and how answers are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Metric = Literal["all", "any"]


@dataclass(frozen=True)
class Turn:
    """A question, whose text ends where the model is to continue, and its reference answers."""

    question: str
    answers: tuple[str, ...]

    @property
    def reference(self) -> str:
        """The answers as the continuation that is expected."""
        return " " + ", ".join(self.answers)


@dataclass(frozen=True)
class Sample:
    """A context and the turns that are asked about it. `history`: later turns see the earlier ones, answered
    by their references; otherwise every turn sees the context only.
    """

    context: str
    turns: tuple[Turn, ...]
    history: bool = False


class Builder(Protocol):
    """Makes a sample whose context grows with `size`; the same generator state gives the same sample."""

    def __call__(self, rng: np.random.Generator, size: int) -> Sample: ...


@dataclass(frozen=True)
class Task:
    """A task: how its samples are built from a size of at least `smallest`, and how they are scored.

    `metric`: `all` is the share of reference answers that the output contains; `any` is 1 if it contains
    one of them (for a question with several right answers). Letter case does not count.
    """

    name: str
    build: Builder
    metric: Metric = "all"
    smallest: int = 1


def score(output: str, answers: tuple[str, ...], metric: Metric) -> float:
    """Recall of the references as strings in the output (arXiv 2404.06654, section 4), from 0 to 1."""
    text = output.lower()
    found = [answer.lower() in text for answer in answers]
    return float(any(found)) if metric == "any" else sum(found) / len(found)
