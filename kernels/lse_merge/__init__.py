"""fp32, -inf-safe, differentiable merge of partial attention results."""

from ltrain_kernels.lse_merge.merge import merge

__all__ = ["merge"]
