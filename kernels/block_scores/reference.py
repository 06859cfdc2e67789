"""The score of a block pair as it is defined; holds a T x T matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def block_scores(q_BTND: Tensor, k_BTKD: Tensor, block: int, *, causal: bool, scale: float) -> Tensor:
    """[B, T / block, T / block] fp32: the maximum over a tile of mean_heads relu(scale q . k)."""
    wide = torch.promote_types(q_BTND.dtype, torch.float32)
    q = q_BTND.to(wide)
    k = k_BTKD.to(wide).repeat_interleave(q.shape[2] // k_BTKD.shape[2], dim=2)
    pairs = torch.einsum("bind,bjnd->bnij", q, k).mul(scale).relu().mean(1)
    if causal:
        pairs = pairs.tril()
    missing = -pairs.shape[-1] % block
    # Scores are not negative, so that padding never is a maximum.
    pairs = F.pad(pairs, (0, missing, 0, missing))
    count = pairs.shape[-1] // block
    return pairs.unflatten(1, (count, block)).unflatten(3, (count, block)).amax((2, 4)).float()
