"""The rule of every layer of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ltrain.attention.patterns import Pattern
from ltrain.generation.learned_rules import NsaRule, SeerGateRule
from ltrain.generation.rules import (
    BlockTopKRule,
    DenseAfterRule,
    Rule,
    Shape,
    StaticRule,
    VerticalSlashRule,
)

RULES: dict[str, type[Rule]] = {
    "vertical_slash": VerticalSlashRule,
    "block_topk": BlockTopKRule,
    "seer_gate": SeerGateRule,
    "nsa": NsaRule,
}


def layer_rules(
    pattern: Pattern,
    shape: Shape,
    windows: tuple[int | None, ...],
    modules: Mapping[int, nn.Module] | None = None,
) -> list[Rule]:
    """The rule of every layer; layers with the same rule share it. `windows` are the model's own, `modules`
    the pattern's own weights by layer.
    """
    made: dict[tuple[Any, ...], Rule] = {}
    rules = []
    for layer, window in enumerate(windows):
        dense = pattern.is_dense_layer(layer, shape.num_layers)
        sparse = StaticRule if pattern.static else RULES.get(pattern.kind, DenseAfterRule)
        module = (modules or {}).get(layer)
        key = (dense, window, id(module))
        if key not in made:
            made[key] = (Rule if dense else sparse)(pattern, layer, shape, window, module)
        rules.append(made[key])
    return rules
