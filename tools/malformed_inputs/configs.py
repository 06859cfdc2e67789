"""Malformed configuration files and command lines: (name, file contents, further arguments)."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import yaml

Case = tuple[str, bytes, list[str]]
_ODD = (-1, 0.5, "many", [1], {"a": 1}, None, True, float("nan"), 10**40, "", "1e9999")
_RANGES = {
    "train.seq_len": (0, -4, 10**30, "4k", [208], 209.5),
    "train.tokens_per_step": (0, 833, "832 tokens"),
    "train.steps": (-1, 1.5, "all"),
    "train.dtype": ("fp8", 32, None),
    "optimizer.lr": (0, -1, "fast", float("inf")),
    "optimizer.betas": ([0.9], "0.9", [0.9, "x"], 0.9),
    "optimizer.kind": ("sgd", 3, ["adamw"]),
    "schedule.kind": ("poly", None),
    "parallel.tensor": (0, 3, "two"),
    "parallel.context.degree": (0, 7, -2),
    "parallel.context.schedule": ("rings", 1),
    "attention.pattern": ({"kind": "magic"}, "dense", {"kind": "sliding_window", "window": -5}),
    "rope": ({"kind": "yarn", "factor": -2}, {"kind": "linear", "factor": 0}, {"kind": "spiral"}),
    "model.num_heads": (5, 0, "four"),
    "model.family": ("gpt5", 7),
    "data.sources": ([], {}, "text", [{"kind": "text_tree"}], [{"path": "x"}], [None]),
    "data.tokenizer": ("/nonexistent", 5, ""),
    "run.name": ("", "../../escape", "a b", 5),
    "checkpoint.keep": (0, "all"),
    "sync.kind": ("gossip",),
}


def _set(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(tree)
    *parents, leaf = path.split(".")
    node = changed
    for part in parents:
        node = node.setdefault(part, {})
    node[leaf] = value
    return changed


def _file(tree: Any) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False).encode()


def cases(tree: dict[str, Any], seed: int = 0) -> Iterator[Case]:
    """Every named range, sections of wrong types, unknown fields, and files that are no configuration."""
    rng = random.Random(seed)
    for path, values in _RANGES.items():
        for i, value in enumerate(values):
            yield f"{path}-{i}", _file(_set(tree, path, value)), []
    for section in sorted(tree):
        yield f"{section}-unknown", _file(_set(tree, f"{section}.no_such_field", 1)), []
        odd = rng.choice(_ODD)
        yield f"{section}-odd", _file({**tree, section: odd}), []
    sound = _file(tree)
    yield "empty", b"", []
    yield "null", b"null\n", []
    yield "list", b"- 1\n- 2\n", []
    yield "binary", bytes(rng.randrange(256) for _ in range(512)), []
    yield "zeros", bytes(512), []
    yield "utf16", sound.decode().encode("utf-16"), []
    yield "tabs", sound.replace(b"  ", b"\t"), []
    yield "repeated", sound + b"\ntrain: {steps: 3}\n", []
    yield "alias", b"a: &x [1, 2]\nb: [*x, *x]\n" + sound, []
    yield "tag", b"run: !!python/object/apply:os.system ['touch executed']\n", []
    yield "deep", b"[" * 5000, []
    yield "large", sound + b"# " + b"x" * (2 << 20), []
    yield "numbers", b"1: {2: 3}\n" + sound, []
    yield "two-documents", sound + b"\n---\n" + sound, []
    for i in range(10):
        yield f"cut-{i}", sound[: rng.randrange(1, len(sound) - 40)] + b"\n  {", []
    for i, extra in enumerate(
        (["steps"], ["--train.steps"], ["--a.b.c.d", "1"], ["--train", "7"], ["--", "x"])
    ):
        yield f"arguments-{i}", sound, extra
    yield "world-size", sound, ["--world-size", "0"]
