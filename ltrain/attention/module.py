"""The `core_attention` that replaces mcore's: RoPE from explicit positions, a pattern, an exchange, one
kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ltrain.attention.context import AttentionContext
from ltrain.attention.context_parallel import context_parallel_attention
from ltrain.attention.rope import Rope, apply_rope
from ltrain_kernels.block_sparse import closed

# T tokens, B batch, N query heads, K kv heads, D head dim, all of this rank.


@dataclass(frozen=True)
class AttentionSettings:
    """What every layer's attention shares. `windows` holds one sliding window, or None, for each layer."""

    rope: Rope
    windows: tuple[int | None, ...]
    schedule: str = "auto"
    tensor_rank: int = 0


class CoreAttention(nn.Module):
    """Attention of one layer over the sequence that `packed_seq_params`, an `AttentionContext`, describes.

    Takes q [T, B, N, D] and k, v [T, B, K, D] in the layout's order and returns [T, B, N * D]. Selection is a
    constant: no gradient passes through it.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        settings: AttentionSettings,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.layer = layer_number - 1
        self.settings = settings
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: AttentionContext | None = None,
    ) -> Tensor:
        context = packed_seq_params
        assert context is not None and context.layout is not None and context.rope_positions is not None
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        positions = context.rope_positions
        rope = self.settings.rope
        cos, sin = context.cached("rope", lambda: rope.tables(positions, device=query.device))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        index = self._index(q, k, context)
        out, _ = context_parallel_attention(
            q,
            k,
            v,
            layout=context.layout,
            group=context.group,
            index=index,
            doc_ids=context.doc_ids,
            window=self.settings.windows[self.layer],
            schedule=self.settings.schedule,
            scale=self.scale,
            node_size=context.node_size,
        )
        return out.transpose(0, 1).flatten(2)

    def _index(self, q: Tensor, k: Tensor, context: AttentionContext) -> Any:
        layout = context.layout
        assert layout is not None
        return context.cached("dense", lambda: closed.dense(layout.num_tokens, layout.block))
