"""The MLP half of a transformer layer, x + down(silu(gate) * up), with few bytes saved.

Gate and up are saved, or recomputed in tiles of tokens; norm and activation are always recomputed. Between
forward and backward nothing else is held, and of a tiled half never more than one tile's intermediates. The
weights' gradients are summed over tiles in fp32 (tiled MLP: arXiv 2506.13996, section 3.1.1; here without a
second product for `down`).

Shape legend: S tokens of this rank in the residual, T tokens of its tensor-parallel group (S without sequence
parallelism), B batch, E hidden size, F this rank's MLP width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrain.attention.half import Rebuild, norm_vjp
from ltrain.parallel.linear import (
    Gradients,
    column_forward,
    column_input,
    column_vjp,
    row_forward,
    row_vjp,
    trains,
)
from ltrain.parallel.seam import outside_seam


class MlpHalf:
    """The MLP half over the modules of an mcore layer: its second norm and its gated `MLP`.

    `save_gate_up`: save them for the backward pass, and work on all tokens at once. Otherwise tiles have
    `tile_tokens` tokens over the tensor-parallel group.
    """

    def __init__(self, norm: nn.Module, mlp: Any, *, save_gate_up: bool, tile_tokens: int) -> None:
        self.norm, self.up, self.down = norm, mlp.linear_fc1, mlp.linear_fc2
        self.save_gate_up = save_gate_up
        self.tile = max(1, tile_tokens // (self.up.tp_group.size() if self.up.sequence_parallel else 1))

    def __call__(self, x: Tensor, rebuild: Rebuild | None = None) -> Tensor:
        """y [S, B, E] of x [S, B, E]; with `rebuild` its inputs are saved in the place of x."""
        parameters = [p for part in (self.norm, self.up, self.down) for p in part.parameters()]
        return _MlpHalf.apply(x, self, rebuild, *parameters)

    def tiles(self, num_tokens: int) -> list[slice]:
        size = num_tokens if self.save_gate_up else self.tile
        return [slice(at, min(at + size, num_tokens)) for at in range(0, num_tokens, max(size, 1))]


class _MlpHalf(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, half: MlpHalf, rebuild: Rebuild | None, *parameters: nn.Parameter
    ) -> Tensor:
        y = torch.empty_like(x)
        gate_up = None
        for at in half.tiles(x.shape[0]):
            normed = half.norm(x[at])
            gate_up = column_forward(half.up, normed, column_input(half.up, normed))
            torch.add(x[at], row_forward(half.down, swiglu(gate_up)), out=y[at])
        ctx.half, ctx.parameters = half, parameters
        ctx.rebuild = None if rebuild is None else rebuild.compute
        inputs = (x,) if rebuild is None else rebuild.inputs
        ctx.save_for_backward(gate_up if half.save_gate_up else None, *inputs)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with outside_seam():
            gate_up, *inputs = ctx.saved_tensors
            half, sums = ctx.half, Gradients(ctx.parameters)
            x = inputs[0] if ctx.rebuild is None else ctx.rebuild(*inputs)
            dx = torch.empty_like(x)
            for at in half.tiles(x.shape[0]):
                torch.add(_tile_vjp(half, x[at], gate_up, dy[at], sums), dy[at], out=dx[at])
        return dx, None, None, *sums.take()


def _tile_vjp(half: MlpHalf, x: Tensor, gate_up: Tensor | None, dy: Tensor, sums: Gradients) -> Tensor:
    """Gradient of a tile's x without the residual's part."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        normed = half.norm(x)
    n = normed.detach()
    whole = column_input(half.up, n) if gate_up is None or half.up.weight.requires_grad else None
    if gate_up is None:
        gate_up = column_forward(half.up, n, whole)
    active = swiglu(gate_up) if trains(half.down) else None
    dactive = row_vjp(half.down, active, dy, sums)
    del active
    dgate_up = swiglu_vjp(gate_up, dactive)
    del gate_up, dactive
    return norm_vjp(half.norm, x, normed, column_vjp(half.up, n, whole, dgate_up, sums), sums)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up; gate is the first half of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def swiglu_vjp(gate_up: Tensor, dactive: Tensor) -> Tensor:
    """Gradient of gate and up [..., 2 F] for that of `swiglu`'s result [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_up)
    dgate, dup = result.chunk(2, dim=-1)
    torch.mul(dactive, F.silu(gate), out=dup)
    torch.ops.aten.silu_backward.grad_input(dactive * up, gate, grad_input=dgate)
    return result
