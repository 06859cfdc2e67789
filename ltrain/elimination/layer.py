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
from ltrain.elimination.inputs import LayerInputs
from ltrain.elimination.runtime import Choice, Elimination
from ltrain_kernels.rows import add_rows, close_rows, norm_rows, open_rows


@cache
def eliminating(base: type) -> type:
    """`base`, an mcore `TransformerLayer` around `CoreAttention`, with token elimination.

    The class takes one more argument, `elimination`. In evaluation, and in layers whose ratio is 1, it runs
    the code of `base` and nothing else. `base` may offer `lean_attention(x, context)`, a half with its
    residual, and `mlp_half(x)`.
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
                passed, rows = self._open(hidden_states, choice)
                inner = self.elimination.excerpt(inputs, choice)
                rows = self._mlp(self._attention(rows, inner))
                return self._close(passed, rows, choice), None
            half = {"qkv": self._kept, "q": self._asking, "backward": self._exact_forward}[mode]
            return self._mlp(half(hidden_states, inputs, choice)), None

        def _kept(self, x: Tensor, inputs: LayerInputs, choice: Choice) -> Tensor:
            """Dropped tokens are neither queries nor keys."""
            inner = self.elimination.excerpt(inputs, choice)
            norm = self.input_layernorm
            if hasattr(self, "lean_attention") or choice.padding or type(norm).forward is not _RMS_FORWARD:
                passed, rows = self._open(x, choice)
                return self._close(passed, self._attention(rows, inner), choice)
            eps = norm.eps if norm.eps is not None else torch.finfo(x.dtype).eps
            passed, normed = norm_rows(x, choice.rows, norm.weight, eps)
            out, bias = self.self_attention(normed, None, packed_seq_params=inner)
            return add_rows(passed, choice.rows, out if bias is None else out + bias)

        def _asking(self, x: Tensor, inputs: LayerInputs, choice: Choice) -> Tensor:
            """Dropped tokens are keys, not queries: their rows of attention are empty, and so zero."""
            return self._attention(x, self.elimination.queries_only(inputs.context, choice))

        def _exact_forward(self, x: Tensor, inputs: LayerInputs, choice: Choice) -> Tensor:
            """The dense half's value; its gradient as if the dropped tokens had been constants, with the
            softmax's normaliser that of all tokens."""
            seen: list[tuple[Tensor, Tensor]] = []
            with torch.no_grad():
                whole = self.elimination.recorded(inputs.context, seen)
                value = self._attention(x, whole)
            ((out, lse),) = seen
            given = (out.index_select(1, choice.local_rows), lse.index_select(2, choice.local_rows))
            inner = self.elimination.excerpt(inputs, choice, given)
            passed, rows = self._open(x, choice)
            return self._close(passed, self._attention(rows, inner), choice, value)

        def _attention(self, x: Tensor, context: AttentionContext) -> Tensor:
            """x + attention(norm(x))."""
            if hasattr(self, "lean_attention"):
                return self.lean_attention(x, context)[0]
            return self._forward_attention(x, packed_seq_params=context)[0]

        def _mlp(self, x: Tensor) -> Tensor:
            """x + mlp(norm(x))."""
            return self.mlp_half(x) if hasattr(self, "mlp_half") else self._forward_mlp(x)

        def _open(self, x: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
            passed, rows = open_rows(x, choice.rows)
            return passed, torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, choice.padding))

        def _close(self, passed: Tensor, rows: Tensor, choice: Choice, value: Tensor | None = None) -> Tensor:
            return close_rows(passed, choice.rows, rows[: len(choice.rows)], value)

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
