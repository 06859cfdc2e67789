"""Samples of a wanted length in tokens."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.eval.sample import Sample, Task

LARGEST = 1 << 22


@dataclass(frozen=True)
class Encoded:
    """A sample's token ids: the context, and of every turn the question and its reference answer."""

    sample: Sample
    context: list[int]
    questions: tuple[list[int], ...]
    references: tuple[list[int], ...]

    @property
    def budgets(self) -> tuple[int, ...]:
        """Tokens that may be generated in each turn: the reference twice and 16 more."""
        return tuple(2 * len(reference) + 16 for reference in self.references)

    @property
    def num_tokens(self) -> int:
        """Tokens that the longest turn needs, its answer included."""
        before = len(self.context)
        longest = 0
        for question, reference, budget in zip(self.questions, self.references, self.budgets, strict=True):
            longest = max(longest, before + len(question) + budget)
            if self.sample.history:
                before += len(question) + len(reference)
        return longest


def encode(sample: Sample, tokens_of: Callable[[str], list[int]], bos: int | None) -> Encoded:
    """Token ids of the sample's parts; the context starts with `bos` where there is one."""
    start = [] if bos is None else [bos]
    return Encoded(
        sample,
        start + tokens_of(sample.context),
        tuple(tokens_of(turn.question) for turn in sample.turns),
        tuple(tokens_of(turn.reference) for turn in sample.turns),
    )


def generator(seed: int, *names: object) -> np.random.Generator:
    """A random generator that depends on the seed and the names only."""
    return np.random.default_rng([seed, *(zlib.crc32(str(name).encode()) for name in names)])


def check_fits(task: Task, length: int, smallest: Encoded) -> None:
    """Raise ConfigError where the smallest sample of a task is longer than `length`."""
    if smallest.num_tokens > length:
        rule = f"is too short for {task.name}, which needs {smallest.num_tokens} tokens with this tokenizer"
        raise ConfigError("--lengths", length, rule, f"use at least {smallest.num_tokens}")


def fit(task: Task, length: int, seed: int, index: int, encoded: Callable[[Sample], Encoded]) -> Encoded:
    """Sample `index` of the task with the most context that fits in `length` tokens, answer included.

    Raises ConfigError where not even the smallest one fits.
    """

    def make(size: int) -> Encoded:
        return encoded(task.build(generator(seed, task.name, length, index), size))

    best = make(task.smallest)
    check_fits(task, length, best)
    low, high = task.smallest, max(2 * task.smallest, 2)
    while high < LARGEST and (made := make(high)).num_tokens <= length:
        low, best, high = high, made, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        made = make(middle)
        if made.num_tokens <= length:
            low, best = middle, made
        else:
            high = middle
    return best
