"""Patterns of attention: what each query attends, as a `BlockIndex` over the whole sequence in document
order.

`patterns.sliding_window(window=4096, sinks=64).index(num_tokens=..., num_kv_heads=...)`; `from_config`
makes one from its configuration section. One pattern a file in `kinds/`; the common protocol is in
`base.py`.
"""

from __future__ import annotations

from pydantic import BaseModel

from ltrain.attention.patterns.base import Capabilities, Pattern, Selection
from ltrain.attention.patterns.kinds.block_topk import BlockTopK as block_topk
from ltrain.attention.patterns.kinds.dense import Dense as dense
from ltrain.attention.patterns.kinds.longgen import LongGen as longgen
from ltrain.attention.patterns.kinds.nsa import Nsa as nsa
from ltrain.attention.patterns.kinds.s2 import S2 as s2
from ltrain.attention.patterns.kinds.seer_gate import SeerGate as seer_gate
from ltrain.attention.patterns.kinds.sliding_window import SlidingWindow as sliding_window
from ltrain.attention.patterns.kinds.vertical_slash import VerticalSlash as vertical_slash
from ltrain.attention.patterns.kinds.xattention import XAttention as xattention
from ltrain.attention.patterns.mass import attention_mass
from ltrain.attention.patterns.verticals import Verticals, selected_attention
from ltrain.config.base import ConfigError
from ltrain.config.patterns import PatternFields

KINDS: dict[str, type[Pattern]] = {
    kind.model_fields["kind"].default: kind
    for kind in (dense, sliding_window, s2, longgen, vertical_slash, xattention, block_topk, seer_gate, nsa)
}


def from_config(config: PatternFields) -> Pattern:
    """The pattern of a configuration section (`attention.pattern`). Raises ConfigError on a section of
    another kind.
    """
    kind = KINDS.get(getattr(config, "kind", ""))
    if kind is None or not isinstance(config, BaseModel):
        raise ConfigError(
            "attention.pattern.kind", getattr(config, "kind", None), f"must be one of {', '.join(KINDS)}"
        )
    return kind(**{name: getattr(config, name) for name in type(config).model_fields})


__all__ = [
    "KINDS",
    "Capabilities",
    "Pattern",
    "Selection",
    "Verticals",
    "attention_mass",
    "block_topk",
    "dense",
    "from_config",
    "longgen",
    "nsa",
    "s2",
    "seer_gate",
    "selected_attention",
    "sliding_window",
    "vertical_slash",
    "xattention",
]
