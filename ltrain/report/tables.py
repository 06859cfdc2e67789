"""The report's tables: what each run was, and its held-out loss by position before and after."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from ltrain.report.runs import Evaluation, RunLog


@dataclass(frozen=True)
class Table:
    """A caption, column heads, rows of text, and remarks below."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def facts_table(runs: list[RunLog]) -> Table:
    """One row a fact, one column a run; facts that no run has are left out."""
    columns = [_facts(run) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name, "-") for column in columns)) for name in names]
    return Table("Runs", ("", *(run.name for run in runs)), tuple(rows))


def _facts(run: RunLog) -> dict[str, str]:
    facts: dict[str, str] = {"model": _model(run), "rope": _kind(run.setting("rope"))}
    if run.base_context is not None:
        facts["context before"] = f"{run.base_context:,} tokens"
    _add(facts, "context trained at", run.setting("train.seq_len"), "{:,} tokens")
    _add(facts, "tokens a step", run.setting("train.tokens_per_step"), "{:,}")
    _add(facts, "precision", run.setting("train.dtype"), "{}")
    facts["parallel"] = _parallel(run)
    last = run.training[-1] if run.training else run.records[-1]
    planned = run.setting("train.steps")
    facts["steps"] = f"{last['step']:,}" + (f" of {planned:,}" if isinstance(planned, int) else "")
    _add(facts, "tokens seen", last.get("train/tokens"), "{:,.0f}")
    seconds = run.records[-1]["time"] - run.records[0]["time"]
    facts["wall time"] = f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min {seconds % 60:.0f} s"
    tail = run.values("train/loss")[-10:]
    if tail:
        facts["training loss, last 10 records"] = f"{statistics.fmean(tail):.4f}"
    if run.evaluations:
        facts["held-out loss, first"] = f"{run.evaluations[0].loss:.4f}"
    if len(run.evaluations) > 1:
        facts["held-out loss, last"] = f"{run.evaluations[-1].loss:.4f}"
    for fact, name, form in (
        ("tokens/s, median", "perf/tokens_per_s", "{:,.0f}"),
        ("tokens/s a device, median", "perf/tokens_per_s_per_gpu", "{:,.0f}"),
        ("MFU, median", "perf/mfu", "{:.1%}"),
    ):
        values = run.values(name, skip_first=True)
        _add(facts, fact, statistics.median(values) if values else None, form)
    peak = run.values("mem/max_allocated_gib")
    _add(facts, "peak memory", max(peak) if peak else None, "{:.2f} GiB")
    if last.get("train/skipped_steps"):
        facts["steps skipped"] = f"{last['train/skipped_steps']:.0f}"
    return {name: text for name, text in facts.items() if text}


def _add(facts: dict[str, str], name: str, value: Any, form: str) -> None:
    if isinstance(value, int | float | str):
        try:
            facts[name] = form.format(value)
        except ValueError:  # a hand-written configuration may hold text where a number belongs
            facts[name] = str(value)


def _kind(section: Any) -> str:
    """A section's kind and its numbers."""
    if not isinstance(section, dict):
        return ""
    rest = [f"{k} {v:g}" for k, v in section.items() if type(v) in (int, float)]
    return ", ".join([str(section.get("kind", "")), *rest])


def _model(run: RunLog) -> str:
    if run.setting("model.kind") == "hf":
        return str(run.setting("model.path"))
    size = (run.setting("model.num_layers"), run.setting("model.hidden_size"))
    return f"new {run.setting('model.family')}, {size[0]} layers of {size[1]}"


def _parallel(run: RunLog) -> str:
    degrees = {
        "tensor": run.setting("parallel.tensor"),
        "pipeline": run.setting("parallel.pipeline"),
        "context": run.setting("parallel.context.degree"),
    }
    named = [f"{name} {n}" for name, n in degrees.items() if isinstance(n, int) and n > 1]
    return ", ".join(named) or "data only"


def position_table(run: RunLog) -> Table | None:
    """Held-out loss by position bucket before and after; None where the run evaluated nothing by position."""
    evaluations = [e for e in run.evaluations if e.by_position]
    if not evaluations:
        return None
    before, after = evaluations[0], evaluations[-1]
    title = f"Held-out loss by position in the document, nats a token: {run.name}"
    first = f"step {before.step:,}"
    if len(evaluations) == 1:
        rows = tuple(
            (label, f"{before.by_position[end]:.4f}") for end, label in bucket_labels(before).items()
        )
        return Table(title, ("positions", first), (*rows, ("all", f"{before.loss:.4f}")), _notes(run, before))
    labels = {**bucket_labels(before), **bucket_labels(after)}
    compared = tuple(
        (label, *_before_after(before.by_position.get(end), after.by_position.get(end)))
        for end, label in sorted(labels.items())
    )
    heads = ("positions", f"before ({first})", f"after (step {after.step:,})", "change")
    return Table(
        title,
        heads,
        (*compared, ("all", *_before_after(before.loss, after.loss))),
        _notes(run, before, after),
    )


def bucket_labels(evaluation: Evaluation) -> dict[int, str]:
    """Upper end of each bucket to its label, `256 to 511`: positions, the first and the last."""
    ends = list(evaluation.by_position)
    return {end: f"{start:,} to {end - 1:,}" for start, end in zip([0, *ends], ends, strict=False)}


def _before_after(before: float | None, after: float | None) -> tuple[str, str, str]:
    texts = tuple("-" if v is None else f"{v:.4f}" for v in (before, after))
    if before is None or after is None:
        return (*texts, "-")  # type: ignore[return-value]
    return (*texts, change(before, after))  # type: ignore[return-value]


def change(before: float, after: float) -> str:
    """`-0.1234 (-5.6 %)`: the difference, and its share of the value before."""
    share = f" ({100 * (after - before) / before:+.1f} %)" if before else ""
    return f"{after - before:+.4f}{share}"


def mean_loss(evaluation: Evaluation, low: int, high: float) -> float | None:
    """Mean loss of the buckets that lie in positions [low, high): weighted by targets where they are known,
    otherwise every bucket alike. None where no bucket lies there.
    """
    ends = list(evaluation.by_position)
    inside = [e for s, e in zip([0, *ends], ends, strict=False) if s >= low and e <= high]
    if not inside:
        return None
    weights = [evaluation.targets.get(end) for end in inside]
    known = [w for w in weights if w]
    if len(known) < len(inside):
        return statistics.fmean(evaluation.by_position[end] for end in inside)
    return statistics.fmean((evaluation.by_position[end] for end in inside), known)


def _notes(run: RunLog, *evaluations: Evaluation) -> tuple[str, ...]:
    """Lines on the loss within the base model's context and beyond it."""
    context = run.base_context
    if context is None:
        return ("The base model's config.json is not readable here, so its context is not known.",)
    ends = list(evaluations[0].by_position)
    weighted = all(set(e.by_position) <= set(e.targets) for e in evaluations)
    how = "mean over target tokens" if weighted else "mean over the buckets"
    notes = []
    for what, low, high in (("within", 0, context), ("beyond", context, float("inf"))):
        means = [mean_loss(evaluation, low, high) for evaluation in evaluations]
        place = f"{what} the base model's context of {context:,} tokens"
        if any(mean is None for mean in means):
            notes.append(f"No bucket lies wholly {place}.")
        elif len(means) == 1:
            notes.append(f"Loss {place}: {means[0]:.4f} ({how}).")
        else:
            first, last = means[0], means[-1]
            assert first is not None and last is not None
            notes.append(
                f"Loss {place}: {first:.4f} before, {last:.4f} after, {change(first, last)} ({how})."
            )
    straddling = [(s, e) for s, e in zip([0, *ends], ends, strict=False) if s < context < e]
    notes += [f"Positions {s:,} to {e - 1:,} lie on both sides and count as neither." for s, e in straddling]
    return tuple(notes)
