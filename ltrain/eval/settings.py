"""The settings of an evaluation, and the command-line options that set them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ltrain.config.base import ConfigError


@dataclass(frozen=True)
class EvalSettings:
    """How to evaluate. `samples` per task and length (needle: per depth and length); `text`, `holdout`,
    `cache` and `max_text_tokens` are of perplexity, `limit` and `include` of lm-eval. `attention` and `block`
    are as `choose_attention` takes them; `beyond_context` allows lengths that the model is not made for.
    """

    samples: int = 4
    seed: int = 0
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    text: Path = Path("stdlib")
    holdout: float = 0.05
    max_text_tokens: int = 65536
    cache: Path = Path(".cache/ltrain")
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "trained"
    block: int | None = None
    beyond_context: bool = False
    limit: int | None = None
    include: Path | None = None

    def check(self, lengths: Sequence[int]) -> None:
        """Raise ConfigError on values that mean nothing."""
        if not lengths or min(lengths) < 2:
            raise ConfigError("--lengths", list(lengths), "must be 2 tokens or more each")
        for name, value in (("--samples", self.samples), ("--max-text-tokens", self.max_text_tokens)):
            if value < 1:
                raise ConfigError(name, value, "must be at least 1")
        if self.seed < 0:
            raise ConfigError("--seed", self.seed, "must not be negative")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ConfigError("--depths", list(self.depths), "must be shares from 0 to 1")
        if not 0 <= self.holdout < 1:
            raise ConfigError("--holdout", self.holdout, "must be at least 0 and below 1")


def check_context(folder: Path, lengths: Sequence[int], *, beyond: bool = False) -> int | None:
    """The context that a model folder states, None where it states none.

    Raises ConfigError where a length is longer, unless `beyond` allows it.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        rule = f"has a config.json that cannot be read: {error}"
        raise ConfigError("MODEL", str(folder), rule, "export the model again") from None
    context = config.get("max_position_embeddings") if isinstance(config, dict) else None
    if not isinstance(context, int):
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "dynamic":
        # The field keeps the context before scaling; this kind goes on beyond it by its factor.
        context = int(context * float(rope.get("factor", 1)))
    if max(lengths) > context and not beyond:
        rule = f"is longer than the model's context, max_position_embeddings={context}"
        fix = f"use lengths up to {context}, or --beyond-context"
        raise ConfigError("--lengths", max(lengths), rule, fix)
    return context


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    default = EvalSettings()
    add = command.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder, as training and export write it")
    add(
        "--tasks",
        nargs="+",
        default=["needle", "perplexity"],
        metavar="TASK",
        help="needle, perplexity, ruler, shared, one task of these groups, or lm_eval:TASK",
    )
    add(
        "--lengths",
        nargs="+",
        type=int,
        required=True,
        metavar="N",
        help="tokens, answer included",
    )
    add("--out", type=Path, default=None, metavar="DIR", help="folder to write to (default: MODEL-eval)")
    add("--samples", type=int, default=default.samples, help="samples of a task and length")
    add("--seed", type=int, default=default.seed, help="seed of the questions")
    add("--depths", nargs="+", type=float, default=list(default.depths), help="needle depths, 0 to 1")
    add("--text", type=Path, default=default.text, help="folder of text for perplexity, or `stdlib`")
    add(
        "--holdout",
        type=float,
        default=default.holdout,
        help="data.holdout in training (0: all text)",
    )
    add("--max-text-tokens", type=int, default=default.max_text_tokens, help="tokens of text for perplexity")
    add("--cache", type=Path, default=default.cache, help="folder of tokenised text")
    add("--device", default=default.device, help="auto, cpu or cuda")
    add("--dtype", choices=("auto", "fp32", "bf16"), default=default.dtype, help="type of the weights")
    add(
        "--attention",
        default=default.attention,
        metavar="A",
        help="trained (as ltrain.json says), dense, or a pattern as YAML: '{kind: s2, stride: 8}'",
    )
    add("--block", type=int, default=None, metavar="N", help="tokens of a block (default: as trained)")
    add("--beyond-context", action="store_true", help="allow lengths above max_position_embeddings")
    add("--limit", type=int, default=None, help="lm-eval: samples of a task")
    add("--include", type=Path, default=None, metavar="DIR", help="lm-eval: folder of further task files")
