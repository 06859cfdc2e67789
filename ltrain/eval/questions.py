"""Questions over many documents, one or two of which hold the answer.

RULER's QA tasks (arXiv 2404.06654, section 3.4) hide the paragraphs of a published data set among others. We
make the paragraphs up, so that nothing has to be downloaded and no model has read them: `qa_1` needs one
document, as SQuAD does, `qa_2` joins two, as HotpotQA does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ltrain.eval.haystack import sentence
from ltrain.eval.sample import Sample, Task, Turn
from ltrain.eval.words import NAMES, NOUNS, SURNAMES, TOWNS, TRADES, distinct


def _person(rng: np.random.Generator) -> str:
    return f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}"


@dataclass(frozen=True)
class Documents:
    """`size` documents beside the two of each question that can hold its answer, in random order.

    A question of one hop asks what a document says of a person, one of two hops joins two documents. With
    several questions both kinds alternate, those of `num_hops` first.
    """

    num_hops: int
    num_questions: int = 1

    def __call__(self, rng: np.random.Generator, size: int) -> Sample:
        return Sample(*self.parts(rng, size))

    def parts(self, rng: np.random.Generator, size: int) -> tuple[str, tuple[Turn, ...]]:
        """The context and the questions."""
        people = distinct(rng, _person, size + 2 * self.num_questions)
        facts = [(rng.choice(TOWNS), rng.choice(TRADES), rng.choice(NOUNS)) for _ in people]
        documents = [
            f"{person} was born in {town} and works as a {trade}. {sentence(rng)} "
            f"{person} collects every old {thing} of the region."
            for person, (town, trade, thing) in zip(people, facts, strict=True)
        ]
        turns = []
        for number in range(self.num_questions):
            first, second = 2 * number, 2 * number + 1
            if (self.num_hops == 1) == (number % 2 == 0):
                question = f"What does {people[first]} work as?"
                answer = str(facts[first][1])
            else:
                documents[first] = f"{people[first]} shares a house with {people[second]}. {sentence(rng)}"
                question = f"In which town was the person born who shares a house with {people[first]}?"
                answer = str(facts[second][0])
            turns.append(Turn(f"Question: {question}\nAnswer:", (answer,)))
        order = rng.permutation(len(documents))
        text = "\n\n".join(f"Document {i}:\n{documents[j]}" for i, j in enumerate(order, 1))
        context = f"Answer the question from the documents below, in as few words as you can.\n\n{text}\n\n"
        return context, tuple(turns)


TASKS = (
    Task("qa_1", Documents(1), "any", smallest=0),
    Task("qa_2", Documents(2), "any", smallest=0),
)
