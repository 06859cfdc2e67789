"""Runs that are small enough to train several times in a test."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = [
    "def",
    "return",
    "import",
    "class",
    "self",
    "value",
    "for",
    "in",
    "range",
    "if",
    "else",
    "while",
    "None",
    "True",
    "print",
    "sum",
    "list",
    "dict",
    "set",
]


def write_text(folder: Path, documents: int = 60, seed: int = 0) -> Path:
    """A folder of text files of uneven lengths."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        length = int(rng.lognormal(2.3, 0.9)) + 2
        (folder / f"doc{i:03d}.py").write_text(" ".join(rng.choice(WORDS, length)))
    return folder


def tiny_tree(folder: Path, **overrides: Any) -> dict[str, Any]:
    """A configuration tree of a tiny model on text in `folder`; overrides are dotted with `__`."""
    tree: dict[str, Any] = {
        "run": {"name": "tiny", "output": str(folder / "outputs")},
        "model": {
            "kind": "new",
            "family": "llama",
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 48,
            "max_position_embeddings": 128,
            "tie_embeddings": False,
        },
        "data": {
            "sources": [{"kind": "text_tree", "path": str(folder / "text")}],
            "cache": str(folder / "cache"),
        },
        "train": {"seq_len": 208, "tokens_per_step": 832, "steps": 6, "dtype": "fp32", "timeout_s": 60},
        "optimizer": {"kind": "adamw", "lr": 0.01},
        "schedule": {"kind": "constant"},
        "parallel": {"context": {"schedule": "ring", "block": 16}},
        "checkpoint": {"every": 0, "asynchronous": False},
        "metrics": {"console": "quiet"},
        "eval": {"max_tokens": 0},
    }
    for name, value in overrides.items():
        *parents, leaf = name.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def build(tree: dict[str, Any]) -> Any:
    """Build a run from a tree, on the default process group."""
    from ltrain.config.load import validate
    from ltrain.parallel.mesh import init_process_group
    from ltrain.train.build import build_run
    from ltrain.train.main import set_seed

    config = validate(tree)
    init_process_group(60)
    set_seed(config.run.seed)
    return build_run(config)


def parameter_hash(model: torch.nn.Module) -> str:
    """A hash of this rank's parameters, bit for bit."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + parameter.detach().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
