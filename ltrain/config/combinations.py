"""`docs/combinations.md`, made by asking the schema.

python -m ltrain.config.combinations > docs/combinations.md
"""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

from ltrain.config.base import ConfigError
from ltrain.config.load import validate

HEAD = """# What can be combined

Every pair of parts, asked of the checks that every command runs before it starts: `yes`, or the number of
the reason below. What needs a world size, a device or a model's shape besides (divisibility,
`memory.level=offload` without a GPU) is checked when those are known, by `ltrain check CONFIG --world-size
N`. All five parts at once: `configs/all_cpu.yaml`, [measured](benchmarks/all_parts.md). This page is
generated from the schema.

"""

BASE: dict[str, Any] = {
    "model": {
        **{"kind": "new", "hidden_size": 64, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4},
        **{"ffn_hidden_size": 128, "max_position_embeddings": 4096},
    },
    "data": {"sources": [{"kind": "text_tree", "path": "stdlib"}]},
    "train": {"seq_len": 4096, "tokens_per_step": 8192},
}
PEERS = {"rendezvous": "127.0.0.1:29400", "token_file": "token", "replica": "a", "num_replicas": 2}
KINDS = (
    "sliding_window", "s2", "longgen", "vertical_slash", "xattention", "block_topk", "seer_gate", "nsa",
)  # fmt: skip
PARTS: dict[str, dict[str, Any]] = {
    **{kind: {"attention.pattern": {"kind": kind}} for kind in KINDS},
    "context 2": {"parallel.context.degree": 2},
    "tensor 2": {"parallel.tensor": 2},
    "pipeline 2": {"parallel.pipeline": 2},
    "stage links": {
        "parallel.pipeline": 2,
        "parallel.stage_links": {"kind": "projection", "rank": 16},
    },
    "planned": {
        "parallel.assignment": {
            "kind": "planned",
            "cluster": {"kind": "uniform", "tokens_per_device": 8192},
            "cost": {"kind": "given", "attention_s": 1e-9, "linear_s": 1e-6, "bytes_per_token": 1e4},
        }
    },
    "elimination": {"elimination": {"kind": "blocks", "strata": 8}},
    "memory mlp": {"memory.level": "mlp"},
    "memory full": {"memory.level": "full"},
    "LoRA": {"model.adapter": {"kind": "lora", "rank": 8}},
    "bf16": {"train.dtype": "bf16"},
    "diloco": {"sync": {"kind": "diloco", "peers": PEERS}},
    "sparse_loco": {"sync": {"kind": "sparse_loco", "peers": PEERS}},
}


def tree_of(*parts: str) -> dict[str, Any]:
    """The base configuration with these parts switched on."""
    tree = copy.deepcopy(BASE)
    for part in parts:
        for path, value in PARTS[part].items():
            *parents, leaf = path.split(".")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = copy.deepcopy(value)
    return tree


def refusal(*parts: str) -> str | None:
    """Why these parts can't be combined, or None."""
    try:
        validate(tree_of(*parts))
    except ConfigError as error:
        return str(error)
    return None


def exclusive(one: str, other: str) -> bool:
    """Whether both are values of the same field."""
    return bool(PARTS[one].keys() & PARTS[other].keys() - {"parallel.pipeline"}) or {one, other} == {
        "memory mlp", "memory full"
    }  # fmt: skip


def combinations_page() -> str:
    """The whole page. Raises ConfigError where a part is refused by itself."""
    for part in PARTS:
        validate(tree_of(part))
    reasons: list[str] = []
    cells: dict[frozenset[str], str] = {}
    for one, other in combinations(PARTS, 2):
        if exclusive(one, other):
            cells[frozenset((one, other))] = "-"
            continue
        reason = refusal(one, other)
        if reason is not None and reason not in reasons:
            reasons.append(reason)
        cells[frozenset((one, other))] = "yes" if reason is None else f"[{reasons.index(reason) + 1}]"
    columns = [part for part in PARTS if part not in KINDS]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in PARTS:
        values = ["" if row == column else cells[frozenset((row, column))] for column in columns]
        lines.append(f"| {row} | " + " | ".join(values) + " |")
    notes = [f"{number}. `{reason}`" for number, reason in enumerate(reasons, 1)]
    return HEAD + "\n".join(lines) + "\n\n" + "\n".join(notes) + "\n"


if __name__ == "__main__":
    print(combinations_page(), end="")
