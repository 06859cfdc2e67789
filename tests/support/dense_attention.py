"""A plain `core_attention` for tests of the model: rotary embedding and dense causal attention of one
sequence."""

import torch
import torch.nn.functional as F
from torch import nn

from ltrain.attention.rope import apply_rope


class DenseAttention(nn.Module):
    """Takes q [T, B, N, D] and k, v [T, B, K, D] in document order; positions are 0 .. T - 1."""

    def __init__(self, *, layer_number, rope, windows, **unused):
        super().__init__()
        self.rope, self.window = rope, windows[layer_number - 1]

    def forward(self, query, key, value, attention_mask=None, **unused):
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        positions = torch.arange(q.shape[1], dtype=torch.int32)
        cos, sin = self.rope.tables(positions)
        q, k, v = (x.transpose(1, 2) for x in (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v))
        distance = positions[:, None] - positions[None, :]
        mask = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.transpose(1, 2).transpose(0, 1).flatten(2)
