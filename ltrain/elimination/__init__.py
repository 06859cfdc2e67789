"""Token elimination: a layer's attention runs on the informative blocks of tokens only."""

from __future__ import annotations

from ltrain.elimination.select import select_blocks

__all__ = ["select_blocks"]
