"""`ltrain eval`: a model folder, tasks and lengths in; results.json, samples.jsonl and pictures out."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from ltrain.config.base import ConfigError
from ltrain.config.data import TextTree
from ltrain.data.tokenizer import Tokenizer, load_tokenizer
from ltrain.eval.answers import Answer, ask, check_lengths
from ltrain.eval.context_parallel import ContextParallelModel, check_context_parallel
from ltrain.eval.harness import require_harness, run_harness
from ltrain.eval.model import EvalModel, load_model
from ltrain.eval.perplexity import Losses, held_out_documents, perplexity
from ltrain.eval.ranks import Ranks, joined, world
from ltrain.eval.settings import EvalSettings, check_context
from ltrain.eval.tasks import Selection, needle_task, select
from ltrain.generation.choice import choose_attention
from ltrain.generation.loading import check_folder
from ltrain.model.attention_file import TrainedAttention
from ltrain.report.evaluations import FILE, SCHEMA_VERSION, figures
from ltrain.report.theme import LIGHT

Say = Callable[[str], None]


def run_eval(
    folder: Path,
    tasks: Sequence[str],
    lengths: Sequence[int],
    out: Path,
    settings: EvalSettings | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Evaluate a model folder and write `results.json`, `samples.jsonl` and pictures into `out`.

    Returns what results.json holds: the mean score and reference loss of every task and length, the needle's
    scores by depth and length, losses by window, and lm-eval's results. The same arguments give the same
    questions. Under torchrun every rank asks a part of the samples and holds a part of every text of
    perplexity; all ranks return the same, the first one writes. Raises ConfigError on wrong input, before a
    process group starts and before the model is loaded where that is possible.
    """
    settings = settings or EvalSettings()
    settings.check(lengths)
    chosen = select(tasks)
    lengths = sorted(set(lengths))
    ranks = world()
    check_folder(folder)
    attention = choose_attention(folder, settings.attention, settings.block)
    tokenizer = load_tokenizer(str(folder))
    context = check_context(folder, lengths, beyond=settings.beyond_context)
    _check_tasks(chosen, folder, lengths, ranks, tokenizer, settings)
    out = _folder(out)
    evaluation = _Evaluation(folder, lengths, settings, attention, ranks, say if ranks.first else _silent)
    results: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "model": str(folder),
        "context": context,
        "attention": attention.model_dump(mode="json"),
        "seed": settings.seed,
        "samples": settings.samples,
        "lengths": list(lengths),
    }
    with joined(ranks), (out / "samples.jsonl" if ranks.first else Path(os.devnull)).open("w") as file:
        results |= evaluation.run(chosen, tokenizer, file)
    if ranks.first:
        _write(out, results)
    return results


class _Evaluation:
    """The parts of one evaluation."""

    def __init__(
        self,
        folder: Path,
        lengths: Sequence[int],
        settings: EvalSettings,
        attention: TrainedAttention,
        ranks: Ranks,
        say: Say,
    ) -> None:
        self.folder, self.lengths, self.settings = folder, lengths, settings
        self.attention, self.ranks, self.say = attention, ranks, say
        self.file: IO[str] = sys.stdout

    def run(self, chosen: Selection, tokenizer: Tokenizer, file: IO[str]) -> dict[str, Any]:
        """Evaluate; answers are written to `file` as they come."""
        self.file = file
        shared = chosen.perplexity and self.ranks.size > 1
        found: dict[str, Any] = {}
        if chosen.tasks or chosen.needle or chosen.harness or not shared:
            found = self._with_whole_model(chosen, None if shared else tokenizer)
        if shared:
            parallel = ContextParallelModel(self.folder, self.attention, dtype=self.settings.dtype)
            found["perplexity"] = self._perplexity(parallel, tokenizer)
        return found

    def _with_whole_model(self, chosen: Selection, tokenizer: Tokenizer | None) -> dict[str, Any]:
        """What every rank asks of a model of its own; perplexity too where there is a tokenizer."""
        found: dict[str, Any] = {}
        settings = self.settings
        model = load_model(
            self.folder, device=settings.device, dtype=settings.dtype, attention=self.attention
        )
        if chosen.tasks:
            found["tasks"] = {task.name: self._by_length(model, task) for task in chosen.tasks}
        if chosen.needle:
            found["needle"] = self._needle(model)
        if chosen.perplexity and tokenizer is not None:
            found["perplexity"] = self._perplexity(model, tokenizer)
        if chosen.harness:
            found["lm_eval"] = self._harness(model, chosen.harness)
        return found

    def _ask(self, model: EvalModel, task: Any, length: int) -> dict[str, Any]:
        settings = self.settings
        part = self.ranks.part(settings.samples)
        answers = self.ranks.gather(ask(model, task, length, samples=part, seed=settings.seed))
        answers.sort(key=lambda answer: (answer.index, answer.turn))
        self.file.writelines(json.dumps(answer.record()) + "\n" for answer in answers)
        self.file.flush()
        return summary(answers)

    def _by_length(self, model: EvalModel, task: Any) -> dict[int, Any]:
        cells = {}
        for length in self.lengths:
            cells[length] = self._ask(model, task, length)
            self.say(f"{task.name} at {length:,} tokens: {cells[length]['score']:.2f}")
        return cells

    def _needle(self, model: EvalModel) -> dict[str, Any]:
        scores, losses = [], []
        for depth in self.settings.depths:
            row = [self._ask(model, needle_task(depth), length) for length in self.lengths]
            scores.append([cell["score"] for cell in row])
            losses.append([cell["reference_loss"] for cell in row])
            self.say(
                f"needle at depth {100 * depth:g} %: {', '.join(f'{score:.2f}' for score in scores[-1])}"
            )
        return {"depths": list(self.settings.depths), "scores": scores, "reference_losses": losses}

    def _perplexity(self, model: Losses, tokenizer: Tokenizer) -> list[dict[str, Any]]:
        settings = self.settings
        documents = held_out_documents(
            TextTree(path=settings.text),
            tokenizer,
            holdout=settings.holdout,
            cache=settings.cache,
            max_tokens=settings.max_text_tokens,
        )
        results = []
        for window in self.lengths:
            results.append(perplexity(model, [document.tolist() for document in documents], window))
            self.say(f"loss with a window of {window:,} tokens: {results[-1]['loss']:.4f}")
        return results

    def _harness(self, model: EvalModel, names: Sequence[str]) -> dict[str, Any]:
        settings = self.settings
        return run_harness(
            model,
            self.folder,
            names,
            self.lengths,
            limit=settings.limit,
            include=settings.include,
            seed=settings.seed,
        )


def _check_tasks(
    chosen: Selection,
    folder: Path,
    lengths: Sequence[int],
    ranks: Ranks,
    tokenizer: Tokenizer,
    settings: EvalSettings,
) -> None:
    """Raise ConfigError on tasks that cannot be run so, before anything is loaded."""
    if chosen.harness:
        require_harness()
        if ranks.size > 1:
            rule = f"runs in one process, there are {ranks.size}"
            raise ConfigError("--tasks", f"lm_eval:{chosen.harness[0]}", rule, "start it without torchrun")
    if chosen.perplexity and ranks.size > 1:
        check_context_parallel(folder, settings.dtype)
    needles = [needle_task(depth) for depth in settings.depths] if chosen.needle else []
    check_lengths(tokenizer, [*chosen.tasks, *needles], lengths, settings.seed)


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Mean score, reference loss and cache; scores by turn as well where there are several."""
    found: dict[str, Any] = {
        "score": statistics.fmean(a.score for a in answers),
        "reference_loss": statistics.fmean(a.reference_loss for a in answers),
        "answers": len(answers),
    }
    caches = [a.cache for a in answers if a.cache is not None]
    if len(caches) == len(answers):
        held, dense = (statistics.fmean(cache[i] for cache in caches) for i in (0, 1))
        found["cache"] = {"bytes": held, "dense_bytes": dense}
    turns = sorted({a.turn for a in answers})
    if len(turns) > 1:
        found["score_by_turn"] = [statistics.fmean(a.score for a in answers if a.turn == t) for t in turns]
    return found


def _silent(line: str) -> None:
    """What the other ranks would say as well."""


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "samples.jsonl").touch()
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise ConfigError("--out", str(out), rule, "choose another folder") from None
    return out


def _write(out: Path, results: dict[str, Any]) -> None:
    """The pictures, and results.json last: it says that the rest is whole."""
    for key, _, figure in figures(results, LIGHT):
        figure.savefig(out / f"{key}.png", dpi=150, facecolor=LIGHT.surface)
    temporary = out / f"{FILE}.tmp"
    temporary.write_text(json.dumps(results, indent=2, default=float) + "\n")
    temporary.replace(out / FILE)
