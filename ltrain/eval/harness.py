"""Tasks of the LM Evaluation Harness over an exported model: its data, its prompts, its scoring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ltrain.config.base import ConfigError
from ltrain.eval.model import EvalModel, SparseEvalModel

PREFIX = "lm_eval:"


def require_harness() -> Any:
    """The `lm_eval` package. Raises ConfigError with the fix where it is not installed."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        fix = "pip install 'lm-eval[hf,ruler]'"
        raise ConfigError(
            "--tasks", PREFIX, f"needs lm-eval, which can't be imported ({error})", fix
        ) from None
    return lm_eval


def run_harness(
    model: EvalModel,
    folder: Path,
    tasks: Sequence[str],
    lengths: Sequence[int],
    *,
    limit: int | None = None,
    include: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Results by task, as the harness reports them, and its version.

    `lengths` are the sequence lengths of tasks that come in several (RULER). `include` is a folder of further
    task files. Tasks fetch their data sets, so they need a network or a filled cache. Raises ConfigError
    where the harness does not know a task or cannot get its data.
    """
    lm_eval = require_harness()
    metadata = {"max_seq_lengths": list(lengths), "pretrained": str(folder)}
    manager = lm_eval.tasks.TaskManager(include_path=str(include) if include else None, metadata=metadata)
    known = set(manager.all_tasks)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        near = [name for name in sorted(known) if unknown[0].split("_")[0] in name][:5]
        fix = f"known with a like name: {', '.join(near)}" if near else "see `lm-eval ls tasks`"
        raise ConfigError("--tasks", PREFIX + unknown[0], "is no task of lm-eval", fix)
    wrapped = _wrapped(lm_eval, model, folder, max(lengths))
    try:
        outcome = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            limit=limit,
            task_manager=manager,
            metadata=metadata,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            bootstrap_iters=0,
        )
    except ImportError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError("--tasks", ", ".join(tasks), f"needs a further package: {reason}") from None
    except OSError as error:  # connection errors are OSErrors too
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        fix = "fill the cache of Hugging Face data sets where there is a network"
        raise ConfigError("--tasks", ", ".join(tasks), f"could not read its data: {reason}", fix) from None
    return {"version": lm_eval.__version__, "results": outcome["results"]}


def _wrapped(lm_eval: Any, model: EvalModel, folder: Path, max_length: int) -> Any:
    """The harness's own wrapper for a dense model, ours for one that attends by a pattern."""
    if isinstance(model, SparseEvalModel):
        from ltrain.eval.harness_model import PatternModel

        return PatternModel(model, folder, max_length)
    return lm_eval.models.huggingface.HFLM(
        pretrained=model.model, tokenizer=str(folder), max_length=max_length, batch_size=1
    )
