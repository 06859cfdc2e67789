"""What is saved for the backward pass: the `memory` section."""

from __future__ import annotations

from typing import Literal

from ltrain.config.base import Section

MemoryLevel = Literal["none", "norms", "mlp", "full", "offload"]


class MemorySection(Section):
    level: MemoryLevel = "none"
    """What a layer saves for its backward pass; gradients are exact at every level and attention never runs
    twice. `none`: what the operations save. `norms`: the two residual inputs, queries, keys, values and
    output of attention, gate and up; norms, rotary embedding and activation are recomputed. `mlp`: not gate
    and up, which are recomputed in tiles of tokens. `full`: the layer's input and attention's output only;
    all products but `down` run again. `offload`: as `full`, with the layer's input moved to host memory
    beside the computation (GPU only)."""
