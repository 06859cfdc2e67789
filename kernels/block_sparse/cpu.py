"""Block-sparse attention on the CPU."""

from ltrain_kernels.block_sparse.cpu_torch import backward, forward

__all__ = ["backward", "forward"]
