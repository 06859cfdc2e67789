"""LongGen: full attention in the middle third of the layers, a cheap pattern at both ends (arXiv
2410.01485).
"""

from __future__ import annotations

from typing import ClassVar

from ltrain.attention.patterns.base import Capabilities, Pattern, Shape
from ltrain.attention.patterns.kinds.s2 import S2
from ltrain.attention.patterns.kinds.sliding_window import SlidingWindow
from ltrain.config.base import ConfigError
from ltrain.config.patterns import LongGenFields, SlidingWindowFields
from ltrain_kernels.block_sparse import BlockIndex


class LongGen(LongGenFields, Pattern):
    """Dense in `full_layers`, else the `sparse` pattern. Head axis 1 or, with strided blocks, Hkv."""

    capabilities: ClassVar[Capabilities] = Capabilities(True, True, True, "1 or Hkv")

    def is_dense_layer(self, layer: int, num_layers: int | None = None) -> bool:
        if layer in self.dense_layers or layer in self.sparse.dense_layers:
            return True
        if isinstance(self.full_layers, tuple):
            return layer in self.full_layers
        if num_layers is None:
            raise ConfigError(
                "num_layers", None, "must be given with full_layers='middle_third'", "or list the layers"
            )
        return num_layers // 3 <= layer < num_layers - num_layers // 3

    def build(self, shape: Shape) -> BlockIndex:
        fields = self.sparse.model_dump(exclude={"kind", "dense_layers"})
        kind = SlidingWindow if isinstance(self.sparse, SlidingWindowFields) else S2
        return kind(**fields).build(shape)
