"""Asking a model the samples of tasks, length by length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ltrain.data.tokenizer import Tokenizer
from ltrain.eval.fit import Encoded, check_fits, encode, fit, generator
from ltrain.eval.model import EvalModel, plain_tokens
from ltrain.eval.sample import Sample, Task, score


@dataclass(frozen=True)
class Answer:
    """One turn: what came out and how it scored. `reference_loss` is the loss (nats a token) of the reference
    answer after the question, which tells models apart that get no answer right yet. `cache` is the bytes of
    the key/value cache after the question, and of a dense one.
    """

    task: str
    length: int
    index: int
    turn: int
    prompt_tokens: int
    answers: tuple[str, ...]
    output: str
    score: float
    reference_loss: float
    cache: tuple[int, int] | None = None

    def record(self) -> dict[str, Any]:
        return asdict(self)


def check_lengths(tokenizer: Tokenizer, tasks: Iterable[Task], lengths: Iterable[int], seed: int) -> None:
    """Raise ConfigError if a length is too short for a task, before anything is asked."""
    shortest = min(lengths)
    for task in tasks:
        sample = task.build(generator(seed, task.name, shortest, 0), task.smallest)
        check_fits(task, shortest, encode(sample, plain_tokens(tokenizer), tokenizer.bos_id))


def ask(
    model: EvalModel, task: Task, length: int, *, samples: int | Iterable[int], seed: int
) -> Iterator[Answer]:
    """Answers to samples of the task that fill `length` tokens: so many, or these."""

    def encoded(sample: Sample) -> Encoded:
        return encode(sample, model.tokens, model.tokenizer.bos_id)

    for index in range(samples) if isinstance(samples, int) else samples:
        yield from ask_one(model, task, length, index, fit(task, length, seed, index, encoded))


def ask_one(model: EvalModel, task: Task, length: int, index: int, encoded: Encoded) -> Iterator[Answer]:
    """The turns of one sample. The context is read once; its cache is kept for all turns."""
    shared = model.read(encoded.context)
    parts = zip(encoded.sample.turns, encoded.questions, encoded.references, encoded.budgets, strict=True)
    for number, (turn, question, reference, budget) in enumerate(parts):
        last = number == len(encoded.questions) - 1
        asked = model.read(question, shared if last else shared.copy())
        held = model.cache_bytes(asked)
        loss = model.losses(reference, asked.copy())
        if encoded.sample.history and not last:
            shared = model.read(reference, asked.copy())
        output = model.generate(asked, budget)
        yield Answer(
            task=task.name,
            length=length,
            index=index,
            turn=number,
            prompt_tokens=asked.num_tokens,
            answers=turn.answers,
            output=output,
            score=score(output, turn.answers, task.metric),
            reference_loss=float(loss.mean()),
            cache=held,
        )
