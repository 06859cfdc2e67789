"""`ltrain eval`: a model folder, tasks and lengths in; results.json, samples.jsonl and pictures out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ltrain.config.base import ConfigError
from ltrain.config.data import TextTree
from ltrain.eval.answers import Answer, ask, check_lengths
from ltrain.eval.harness import require_harness, run_harness
from ltrain.eval.model import EvalModel, load_model
from ltrain.eval.perplexity import held_out_documents, perplexity
from ltrain.eval.plots import heat_map, loss_curves
from ltrain.eval.settings import EvalSettings
from ltrain.eval.tasks import needle_task, select

SCHEMA_VERSION = 1
Report = Callable[[str], None]


def run_eval(
    folder: Path,
    tasks: Sequence[str],
    lengths: Sequence[int],
    out: Path,
    settings: EvalSettings | None = None,
    say: Report = lambda line: None,
) -> dict[str, Any]:
    """Evaluate a model folder and write `results.json`, `samples.jsonl` and pictures into `out`.

    Returns what results.json holds: the mean score and reference loss of every task and length, the needle's
    scores by depth and length, losses by window, and lm-eval's results. The same arguments give the same
    questions. Raises ConfigError on wrong input, before the model is loaded where that is possible.
    """
    settings = settings or EvalSettings()
    settings.check(lengths)
    chosen = select(tasks)
    lengths = sorted(set(lengths))
    if chosen.harness:
        require_harness()
    out = _folder(out)
    model = load_model(folder, device=settings.device, dtype=settings.dtype)
    if model.context is not None and max(lengths) > model.context:
        say(f"lengths above {model.context:,} tokens are beyond the context that the model states")
    needles = [needle_task(depth) for depth in settings.depths] if chosen.needle else []
    check_lengths(model, [*chosen.tasks, *needles], lengths, settings.seed)
    results: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "model": str(folder),
        "context": model.context,
        "seed": settings.seed,
        "samples": settings.samples,
        "lengths": list(lengths),
    }
    with (out / "samples.jsonl").open("w") as file:

        def gather(answers: Iterable[Answer]) -> list[Answer]:
            found = list(answers)
            file.writelines(json.dumps(answer.record()) + "\n" for answer in found)
            file.flush()
            return found

        if chosen.tasks:
            results["tasks"] = {}
        for task in chosen.tasks:
            by_length = {}
            for length in lengths:
                answers = gather(ask(model, task, length, samples=settings.samples, seed=settings.seed))
                by_length[length] = summary(answers)
                say(f"{task.name} at {length:,} tokens: {by_length[length]['score']:.2f}")
            results["tasks"][task.name] = by_length
        if chosen.needle:
            results["needle"] = _needle(model, lengths, settings, gather, say)
            scores = np.array(results["needle"]["scores"])
            heat_map(scores, settings.depths, lengths, model.context, out / "needle.png")
    if chosen.perplexity:
        results["perplexity"] = _perplexity(model, lengths, settings, say)
        loss_curves(results["perplexity"], out / "perplexity.png")
    if chosen.harness:
        results["lm_eval"] = run_harness(
            model,
            folder,
            chosen.harness,
            lengths,
            limit=settings.limit,
            include=settings.include,
            seed=settings.seed,
        )
    temporary = out / "results.json.tmp"
    temporary.write_text(json.dumps(results, indent=2, default=float) + "\n")
    temporary.replace(out / "results.json")
    return results


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
    """Mean score and reference loss; by turn as well where there are several."""
    found: dict[str, Any] = {
        "score": statistics.fmean(a.score for a in answers),
        "reference_loss": statistics.fmean(a.reference_loss for a in answers),
        "answers": len(answers),
    }
    turns = sorted({a.turn for a in answers})
    if len(turns) > 1:
        found["score_by_turn"] = [statistics.fmean(a.score for a in answers if a.turn == t) for t in turns]
    return found


def _needle(
    model: EvalModel,
    lengths: Sequence[int],
    settings: EvalSettings,
    gather: Callable[[Iterable[Answer]], list[Answer]],
    say: Report,
) -> dict[str, Any]:
    scores, losses = [], []
    for depth in settings.depths:
        task = needle_task(depth)
        row = [
            summary(gather(ask(model, task, length, samples=settings.samples, seed=settings.seed)))
            for length in lengths
        ]
        scores.append([cell["score"] for cell in row])
        losses.append([cell["reference_loss"] for cell in row])
        say(f"needle at depth {100 * depth:g} %: {', '.join(f'{score:.2f}' for score in scores[-1])}")
    return {"depths": list(settings.depths), "scores": scores, "reference_losses": losses}


def _perplexity(
    model: EvalModel, lengths: Sequence[int], settings: EvalSettings, say: Report
) -> list[dict[str, Any]]:
    documents = held_out_documents(
        TextTree(path=settings.text),
        model.tokenizer,
        holdout=settings.holdout,
        cache=settings.cache,
        max_tokens=settings.max_text_tokens,
    )
    results = []
    for window in lengths:
        results.append(perplexity(model, [document.tolist() for document in documents], window))
        say(f"loss with a window of {window:,} tokens: {results[-1]['loss']:.4f}")
    return results


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "samples.jsonl").touch()
    except OSError as error:
        rule = f"cannot be written: {error.strerror}"
        raise ConfigError("--out", str(out), rule, "choose another folder") from None
    return out
