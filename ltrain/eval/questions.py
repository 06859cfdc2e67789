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
    """`size` documents beside the ones that the answer needs, in random order."""

    num_hops: int

    def __call__(self, rng: np.random.Generator, size: int) -> Sample:
        people = distinct(rng, _person, size + 2)
        facts = [(rng.choice(TOWNS), rng.choice(TRADES), rng.choice(NOUNS)) for _ in people]
        documents = [
            f"{person} was born in {town} and works as a {trade}. {sentence(rng)} "
            f"{person} collects every old {thing} of the region."
            for person, (town, trade, thing) in zip(people, facts, strict=True)
        ]
        if self.num_hops == 1:
            question = f"What does {people[0]} work as?"
            answer = str(facts[0][1])
        else:
            documents[0] = f"{people[0]} shares a house with {people[1]}. {sentence(rng)}"
            question = f"In which town was the person born who shares a house with {people[0]}?"
            answer = str(facts[1][0])
        order = rng.permutation(len(documents))
        text = "\n\n".join(f"Document {i}:\n{documents[j]}" for i, j in enumerate(order, 1))
        context = f"Answer the question from the documents below, in as few words as you can.\n\n{text}\n\n"
        return Sample(context, (Turn(f"Question: {question}\nAnswer:", (answer,)),))


TASKS = (
    Task("qa_1", Documents(1), "any", smallest=0),
    Task("qa_2", Documents(2), "any", smallest=0),
)
