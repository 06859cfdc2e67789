"""Every earlier token of the document."""

from __future__ import annotations

from typing import ClassVar

from ltrain.attention.patterns.base import Capabilities, Pattern, Shape, dense_within_documents
from ltrain.config.patterns import DenseFields
from ltrain_kernels.block_sparse import BlockIndex


class Dense(DenseFields, Pattern):
    """Selects every block up to the diagonal; head axis 1; density 1."""

    capabilities: ClassVar[Capabilities] = Capabilities(True, True, True, "1")

    def build(self, shape: Shape) -> BlockIndex:
        return dense_within_documents(shape)
