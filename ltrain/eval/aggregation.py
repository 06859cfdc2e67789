"""Counting over the whole context: RULER's common and frequent words (arXiv 2404.06654, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np

from ltrain.eval.sample import Sample, Task, Turn
from ltrain.eval.words import ADJECTIVES, NOUNS, distinct


@dataclass(frozen=True)
class CommonWords:
    """`num_common` words occur `ratio` times as often as every other one; they are asked for.

    Sizes grow the number of other words. Long contexts have the definition's 30 and 3 occurrences, short ones
    fewer in the same ratio, and those for which the words run out have more.
    """

    num_common: int = 10
    ratio: int = 10
    usual_repeats: int = 3

    def __call__(self, rng: np.random.Generator, size: int) -> Sample:
        pool = [*NOUNS, *ADJECTIVES]
        if size + self.num_common > len(pool):
            pool = [f"{adjective}{noun}" for adjective in ADJECTIVES for noun in NOUNS]
        others = min(size, len(pool) - self.num_common)
        repeats = max(min(self.usual_repeats, 1 + size // 200), self.usual_repeats * size // len(pool))
        chosen = [str(word) for word in rng.permutation(pool)[: others + self.num_common]]
        common, rest = chosen[: self.num_common], chosen[self.num_common :]
        listed = rng.permutation(common * (self.ratio * repeats) + rest * repeats)
        text = "\n".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
        context = f"Below is a numbered list of words, some of which occur far more often.\n\n{text}\n\n"
        question = (
            f"Question: which {self.num_common} words occur most often in the list?\n"
            f"Answer: the {self.num_common} words that occur most often:"
        )
        return Sample(context, (Turn(question, tuple(common)),))


def _coded_word(rng: np.random.Generator) -> str:
    return "".join(rng.choice(list(ascii_lowercase), 6))


@dataclass(frozen=True)
class FrequentWords:
    """A text of made-up words whose frequencies follow a zeta distribution of exponent `alpha`; the three
    most frequent ones are asked for. The most frequent word of all is noise, `...`, as in the definition.
    """

    alpha: float = 2.0
    num_asked: int = 3
    vocabulary: int = 200

    def __call__(self, rng: np.random.Generator, size: int) -> Sample:
        words = ["...", *distinct(rng, _coded_word, self.vocabulary)]
        weights = np.arange(1, len(words) + 1) ** -self.alpha
        # Expected counts rather than draws: the order of frequencies is certain.
        counts = np.maximum(np.floor(size * weights / weights.sum()), 0).astype(int)
        for rank in range(self.num_asked, 0, -1):
            # A short text still tells the asked words apart from those that follow.
            counts[rank] = max(counts[rank], counts[rank + 1] + 1)
        listed = rng.permutation(np.repeat(words, counts))
        text = " ".join(listed)
        context = f"The text below is written in code. Track how often every coded word occurs.\n\n{text}\n\n"
        question = (
            f"Question: leaving the dots aside, which {self.num_asked} coded words occur most often?\n"
            f"Answer: the {self.num_asked} coded words that occur most often:"
        )
        return Sample(context, (Turn(question, tuple(words[1 : self.num_asked + 1])),))


TASKS = (Task("cwe", CommonWords()), Task("fwe", FrequentWords(), smallest=8))
