"""A transformer layer that works on the kept tokens: around mcore's layer, or one that saves little.

S rows of this rank's residual, B batch (1), E hidden size. What dropped tokens skip depends on the mode;
their rows of the residual pass by unchanged, bit for bit, and so do their gradients.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ltrain.attention.context import AttentionContext
from ltrain.attention.half import Cut, Rebuild
from ltrain.elimination.inputs import LayerInputs
from ltrain.elimination.runtime import Choice, Elimination
from ltrain_kernels.block_sparse import BlockIndex
from ltrain_kernels.rows import add_rows, close_rows, norm_rows, open_rows


@cache
def eliminating(base: type) -> type:
    """`base`, an mcore `TransformerLayer` around `CoreAttention`, with token elimination.

    The class takes one more argument, `elimination`. In evaluation, and in layers whose ratio is 1, it runs
    the code of `base` and nothing else. `base` may be a `LeanTransformerLayer`, whose halves are then used.
    """

    class Eliminating(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, elimination: Elimination, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.elimination = elimination

        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            context = kwargs.get("packed_seq_params")
            layer = self.layer_number - 1
            if not self.training or context is None or self.elimination.ratio(layer) == 1:
                return super().forward(hidden_states, *args, **kwargs)
            if hidden_states.shape[1] != 1:
                raise ValueError(f"elimination works on one sequence at a time, not {hidden_states.shape[1]}")
            inputs = self._inputs(hidden_states.detach(), context)
            choice = self.elimination.choose(layer, inputs)
            mode = self.elimination.config.mode
            if mode == "layer":
                passed, rows = open_rows(hidden_states, choice.rows)
                inner = self.elimination.excerpt(inputs, choice)
                rows = self._mlp(*self._attention(choice.cut.pad(rows), inner))
                return close_rows(passed, choice.rows, choice.cut.trim(rows)), None
            half = {"qkv": self._kept, "q": self._asking, "backward": self._exact_forward}[mode]
            return self._mlp(*half(hidden_states, inputs, choice)), None

        def _kept(self, x: Tensor, inputs: LayerInputs, choice: Choice) -> tuple[Tensor, Rebuild | None]:
            """Dropped tokens are neither queries nor keys."""
            inner = self.elimination.excerpt(inputs, choice)
            norm = self.input_layernorm
            if self._lean or choice.cut.padding or type(norm).forward is not _RMS_FORWARD:
                passed, rows = open_rows(x, choice.rows)
                rows, rebuild = self._attention(choice.cut.pad(rows), inner, (x, choice.cut))
                return close_rows(passed, choice.rows, choice.cut.trim(rows)), rebuild
            eps = norm.eps if norm.eps is not None else torch.finfo(x.dtype).eps
            passed, normed = norm_rows(x, choice.rows, norm.weight, eps)
            out, bias = self.self_attention(normed, None, packed_seq_params=inner)
            return add_rows(passed, choice.rows, out if bias is None else out + bias), None

        def _asking(self, x: Tensor, inputs: LayerInputs, choice: Choice) -> tuple[Tensor, Rebuild | None]:
            """Dropped tokens are keys, not queries: their rows of attention are empty, and so zero."""
            return self._attention(x, self.elimination.queries_only(inputs.context, choice))

        def _exact_forward(
            self, x: Tensor, inputs: LayerInputs, choice: Choice
        ) -> tuple[Tensor, Rebuild | None]:
            """The dense half's value; its gradient as if the dropped tokens had been constants, with the
            softmax's normaliser that of all tokens."""
            seen: list[tuple[Tensor, Tensor, BlockIndex]] = []
            with torch.no_grad():
                whole = self.elimination.recorded(inputs.context, seen)
                value, _ = self._attention(x, whole)
            ((out, lse, index),) = seen
            given = (out.index_select(1, choice.local_rows), lse.index_select(2, choice.local_rows))
            # Pairs that the forward pass didn't attend have no part in the normaliser.
            found = index if self.self_attention.core_attention.searches else None
            inner = self.elimination.excerpt(inputs, choice, given, found)
            passed, rows = open_rows(x, choice.rows)
            within = None
            if self._rebuilds:
                # What both halves need: before attention for kept tokens, after it for the others.
                within = (value.index_copy(0, choice.rows, rows.detach()), choice.cut)
            rows, rebuild = self._attention(choice.cut.pad(rows), inner, within)
            return close_rows(passed, choice.rows, choice.cut.trim(rows), value), rebuild

        @property
        def _lean(self) -> bool:
            return hasattr(self, "attention_half")

        @property
        def _rebuilds(self) -> bool:
            return self._lean and self.rebuilds_residual

        def _attention(
            self, x: Tensor, context: AttentionContext, within: tuple[Tensor, Cut] | None = None
        ) -> tuple[Tensor, Rebuild | None]:
            """x + attention(norm(x)), and how to compute it again where the MLP half must not save it."""
            if self._lean:
                return self.attention_half(x, context, within)
            return self._forward_attention(x, packed_seq_params=context)[0], None

        def _mlp(self, x: Tensor, rebuild: Rebuild | None) -> Tensor:
            """x + mlp(norm(x))."""
            return self.mlp_half(x, rebuild) if self._lean else self._forward_mlp(x)

        def _inputs(self, x: Tensor, context: AttentionContext) -> LayerInputs:
            elimination = self.elimination
            return LayerInputs(
                x=x,
                norm=self.input_layernorm,
                attention=self.self_attention,
                context=context,
                sequence=elimination.sequence(context),
                layer=self.layer_number - 1,
                step=elimination.step,
                seed=elimination.seed,
            )

    Eliminating.__name__ = Eliminating.__qualname__ = f"Eliminating{base.__name__}"
    return Eliminating


_RMS_FORWARD = torch.nn.RMSNorm.forward
