"""Importance of block pairs by tile maximum (arXiv 2501.09767)."""

from ltrain_kernels.block_scores.api import block_scores

__all__ = ["block_scores"]
