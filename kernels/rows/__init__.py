"""Rows of the residual that a layer works on: gather with norm, indexed add, replacement."""

from ltrain_kernels.rows.api import add_rows, close_rows, norm_rows, open_rows

__all__ = ["add_rows", "close_rows", "norm_rows", "open_rows"]
