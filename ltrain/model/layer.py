"""A transformer layer that saves few bytes for its backward pass, at exact gradients: `memory.level`.

Level        saved a token, in elements                       computed again in the backward pass
`norms`      x, qkv, out, x', gate, up                        norms, rotary embedding, activation
`mlp`        x, qkv, out, x'                                  gate and up too, in tiles
`full`       x, out                                           qkv, x' too
`offload`    out; x in host memory                            as `full`

x and x' are the residual before either half, out is attention's output; the LSE, 4 bytes a head, is saved
besides, and the index of a dynamic pattern. Attention, its selection, its exchange and the product `down`
never run twice. Adapters' rank-sized products do.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from ltrain.attention.context import AttentionContext
from ltrain.attention.half import AttentionHalf, Cut, Rebuild
from ltrain.config.memory import MemoryLevel
from ltrain.model.memory import tile_tokens
from ltrain.model.mlp import MlpHalf
from ltrain.parallel.offload import HostStore


class LeanTransformerLayer(TransformerLayer):
    """mcore's layer, modules and parameter names unchanged, computed in two halves that save little.

    `attention_half(x, context)` gives the residual after attention and how to rebuild it; `mlp_half(x,
    rebuild)` the layer's output. Token elimination calls the first on the kept tokens, `within` the residual.

    Needs `CoreAttention`, RMSNorm or any other norm module, SwiGLU and no dropout.
    """

    def __init__(self, *args: Any, level: MemoryLevel, store: HostStore | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert (store is not None) == (level == "offload")
        config = self.config
        assert level != "none" and config.gated_linear_unit and config.activation_func is F.silu
        assert config.hidden_dropout == 0 and config.activation_func_clamp_value is None
        self.rebuilds_residual = level in ("full", "offload")
        self.lean_attention = AttentionHalf(
            self.input_layernorm, self.self_attention, save_qkv=not self.rebuilds_residual, store=store
        )
        self.lean_mlp = MlpHalf(
            self.pre_mlp_layernorm,
            self.mlp,
            save_gate_up=level == "norms",
            tile_tokens=tile_tokens(config.hidden_size),
        )

    def attention_half(
        self, x: Tensor, context: AttentionContext, within: tuple[Tensor, Cut] | None = None
    ) -> tuple[Tensor, Rebuild | None]:
        """x + attention(norm(x)), and how to compute it again where the MLP half must not save it; `within`
        as in `AttentionHalf`, for what is computed again."""
        y, rebuild = self.lean_attention(x, context, within if self.rebuilds_residual else None)
        return y, rebuild if self.rebuilds_residual else None

    def mlp_half(self, x: Tensor, rebuild: Rebuild | None = None) -> Tensor:
        """x + mlp(norm(x))."""
        return self.lean_mlp(x, rebuild)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: AttentionContext | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """(y, None) as mcore's block expects, x and y [S, B, E]."""
        assert packed_seq_params is not None
        return self.mlp_half(*self.attention_half(hidden_states, packed_seq_params)), None
