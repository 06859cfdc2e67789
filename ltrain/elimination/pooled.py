"""Scores from block means: causal softmax column mass, the part of the attention that falls on each block.

N blocks, H query heads, K kv heads, D head size, E hidden size; heads are this process's.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of the N x N map that are held at a time: bounds memory to so many x N x H numbers.
_ROWS = 256


@torch.no_grad()
def column_mass(q_NHD: Tensor, k_NKD: Tensor, low_N: Tensor, weight_N: Tensor, scale: float) -> Tensor:
    """Sum over query blocks and heads of softmax(scale q k + log weight) on each key block, fp32 [N].

    Query block i sees key blocks low[i]..i; `weight` counts the tokens that a key block's mean stands for,
    and blocks of weight 0 get nothing. The sum over all blocks is the number of (query block, head) pairs
    that see a key.
    """
    count, heads, _ = q_NHD.shape
    groups = k_NKD.shape[1]
    q = q_NHD.float().unflatten(1, (groups, heads // groups)).permute(1, 2, 0, 3)
    k = k_NKD.float().permute(1, 2, 0).unsqueeze(1)
    log_weight = weight_N.float().log()
    block = torch.arange(count, device=q.device)
    mass = torch.zeros(count, dtype=torch.float32, device=q.device)
    for first in range(0, count, _ROWS):
        stop = min(first + _ROWS, count)
        rows = block[first:stop, None]
        hidden = (block[None, :stop] > rows) | (block[None, :stop] < low_N[first:stop, None])
        logits = q[:, :, first:stop] @ k[..., :stop] * scale + log_weight[:stop]
        share = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
        # A row that sees no key at all is 0 / 0.
        mass[:stop] += share.nan_to_num_(0.0).sum((0, 1, 2))
    return mass


def mean_tables(tables: tuple[Tensor, Tensor], valid_Nt: Tensor) -> tuple[Tensor, Tensor]:
    """Means of rotary cos and sin [N * block, D / 2] over the valid tokens of each block, [N, D / 2] fp32.

    Rotating a block's mean projection by them is the mean of its rotated projections where the tokens of a
    block differ from one another independently of their places in it.
    """
    weight = valid_Nt.float() / valid_Nt.sum(1, keepdim=True).clamp(min=1)
    return tuple(torch.einsum("nt,ntd->nd", weight, x.unflatten(0, valid_Nt.shape)) for x in tables)  # type: ignore[return-value]
