"""A model under its attention pattern, as the LM Evaluation Harness calls models. Needs `lm_eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ltrain.config.base import ConfigError
from ltrain.eval.model import Prefix, SparseEvalModel

MAX_GENERATED = 256


class PatternModel(HFLM):
    """The harness's own wrapper, its requests answered one at a time through the pattern's cache.

    Contexts are cut on the left to `max_length`. Requests that share a context, such as the choices of a
    question, read it once.
    """

    def __init__(self, model: SparseEvalModel, folder: Path, max_length: int) -> None:
        super().__init__(pretrained=model.model, tokenizer=str(folder), max_length=max_length, batch_size=1)
        self.sparse = model
        self._shared: tuple[tuple[int, ...], Prefix] | None = None

    def _read(self, context: list[int]) -> Prefix:
        """A prefix that may be used up."""
        key = tuple(context)
        if self._shared is None or self._shared[0] != key:
            self._shared = (key, self.sparse.read(context))
        return self._shared[1].copy()

    def _loglikelihood_tokens(self, requests: Any, **unused: Any) -> list[tuple[float, bool]]:
        found = []
        for _, context, continuation in requests:
            kept = max(1, self.max_length + 1 - len(continuation))
            context = [*(context or [self.prefix_token_id])][-kept:]
            losses, best = self.sparse.scored(continuation, self._read(context))
            found.append((-float(losses.sum()), best == list(continuation)))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in the harness's disjoint windows of `max_length` tokens."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            total = 0.0
            for context, continuation in map(make_disjoint_window, windows):
                losses = self.sparse.losses([*context, *continuation])
                total += float(losses[-len(continuation) :].double().sum())
            found.append(-total)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop string, which is left out, or the end token."""
        found = []
        for request in requests:
            text, options = request.args
            if options.get("do_sample") and options.get("temperature", 0) > 0:
                rule = "asks for sampling, generation here is greedy"
                raise ConfigError("--tasks", request.task_name, rule, "choose another task")
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else list(until)
            limit = int(options.get("max_gen_toks", MAX_GENERATED))
            context = self.tok_encode(text)[-max(1, self.max_length - limit) :]
            found.append(self._generate(self._read(context), until, limit))
        return found

    def _generate(self, prefix: Prefix, until: list[str], limit: int) -> str:
        ids: list[int] = []
        while len(ids) < limit:
            best = int(prefix.logits.argmax())
            if best == self.sparse.tokenizer.eos_id:
                break
            ids.append(best)
            text = self.sparse.tokenizer.decode(ids)
            ends = [text.index(stop) for stop in until if stop and stop in text]
            if ends:
                return text[: min(ends)]
            if len(ids) < limit:
                prefix = self.sparse.step(best, prefix)
        return self.sparse.tokenizer.decode(ids)
