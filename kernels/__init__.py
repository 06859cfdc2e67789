"""Kernels of ltrain. Needs torch, and triton for the GPU paths; knows nothing of distribution."""
