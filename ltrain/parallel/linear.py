"""mcore's tensor-parallel linears as plain functions: the product, and its gradients from a given input.

An autograd function that saves no input of a linear recomputes that input in its backward and calls `*_vjp`
with it: no product runs a second time. Both kinds may carry a low-rank adapter (`lora_a`, `lora_b`,
`lora_scale`) and a row-parallel one a constant `basis` [E, rank] that its output is multiplied with; any of
their parameters may be frozen, and sequence parallelism is the linear's own setting.

Shape legend: T tokens of the tensor-parallel group, S tokens of this rank (T without sequence parallelism),
B batch; tensors are [tokens, B, features].
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Gradients:
    """Sums the gradients of some parameters over several calls; frozen parameters cost nothing.

    Sums of more than one term are held in fp32 (fp64 for fp64 parameters).
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        self._sums: dict[int, Tensor] = {}

    def add(self, parameter: nn.Parameter | None, gradient: Tensor) -> None:
        """Add a gradient. The tensor belongs to this object afterwards."""
        if parameter is None or not parameter.requires_grad:
            return
        have = self._sums.get(id(parameter))
        if have is None:
            self._sums[id(parameter)] = gradient
            return
        if have.dtype in (torch.bfloat16, torch.float16):
            have = self._sums[id(parameter)] = have.float()
        have += gradient

    def add_product(self, parameter: nn.Parameter | None, dy: Tensor, x: Tensor, scale: float = 1.0) -> None:
        """Add scale * dyᵀ x, summed over tokens and batch, to the gradient of a weight."""
        if parameter is None or not parameter.requires_grad:
            return
        dy, x = dy.flatten(0, -2), x.flatten(0, -2)
        have = self._sums.get(id(parameter))
        if have is not None and have.dtype == dy.dtype and dy.dtype in (torch.float32, torch.float64):
            have.addmm_(dy.t(), x, alpha=scale)
            return
        product = dy.t() @ x
        self.add(parameter, product if scale == 1.0 else product.mul_(scale))

    def take(self) -> tuple[Tensor | None, ...]:
        """The sums in the order and types of the parameters; None for those that are frozen."""
        found = []
        for parameter in self.parameters:
            total = self._sums.pop(id(parameter), None)
            found.append(None if total is None else total.to(parameter.dtype))
        return tuple(found)


def trains(linear: nn.Module) -> bool:
    """Whether the gradients of any of the linear's parameters need its input."""
    return any(p.requires_grad for p in (linear.weight, getattr(linear, "lora_a", None)) if p is not None)


def column_input(linear: Any, x_SBE: Tensor) -> Tensor:
    """What a column-parallel linear multiplies: x of all ranks under sequence parallelism [T, B, E], else
    x."""
    return _gather(x_SBE, linear.tp_group) if linear.sequence_parallel else x_SBE


def column_forward(linear: Any, x_SBE: Tensor, x_TBE: Tensor) -> Tensor:
    """y [T, B, F / ranks] = x Wᵀ + bias + adapter; `x_TBE` is `column_input` of x."""
    y = torch.matmul(x_TBE, linear.weight.t())
    if linear.bias is not None:
        y += linear.bias
    if hasattr(linear, "lora_a"):
        y += linear.lora_scale * (_column_hidden(linear, x_SBE) @ linear.lora_b.t())
    return y


def column_vjp(
    linear: Any, x_SBE: Tensor | None, x_TBE: Tensor | None, dy_TBF: Tensor, sums: Gradients
) -> Tensor:
    """dx [S, B, E]; adds the parameters' gradients to `sums`.

    x may be None where the linear doesn't need it (`trains`); `x_TBE` None is gathered here if needed.
    """
    dx_TBE = dy_TBF @ linear.weight
    pending, dx = _reduce_start(dx_TBE, linear.tp_group, linear.sequence_parallel)
    if linear.weight.requires_grad:
        assert x_SBE is not None
        x_TBE = column_input(linear, x_SBE) if x_TBE is None else x_TBE
        sums.add_product(linear.weight, dy_TBF, x_TBE)
    if linear.bias is not None and linear.bias.requires_grad:
        sums.add(linear.bias, dy_TBF.flatten(0, -2).sum(0))
    dx_lora = None
    if hasattr(linear, "lora_a"):
        if linear.lora_b.requires_grad:
            assert x_SBE is not None
            sums.add_product(linear.lora_b, dy_TBF, _column_hidden(linear, x_SBE), linear.lora_scale)
        dh = linear.lora_scale * (dy_TBF @ linear.lora_b)
        lora_pending, dh = _reduce_start(dh, linear.tp_group, linear.sequence_parallel)
        _wait(lora_pending)
        if linear.lora_a.requires_grad:
            assert x_SBE is not None
            sums.add_product(linear.lora_a, dh, x_SBE)
        dx_lora = dh @ linear.lora_a
    _wait(pending)
    return dx if dx_lora is None else dx.add_(dx_lora)


def row_forward(linear: Any, x_TBF: Tensor) -> Tensor:
    """y [S, B, E] = sum over ranks of x Wᵀ, + bias + adapter, from this rank's features x [T, B, F / ranks].

    The bias is added here, also where mcore would hand it back to its caller.
    """
    pending, y = _reduce_start(
        torch.matmul(x_TBF, linear.weight.t()), linear.tp_group, linear.sequence_parallel
    )
    hidden = _row_hidden(linear, x_TBF) if hasattr(linear, "lora_a") else None
    _wait(pending)
    if hidden is not None:
        y += linear.lora_scale * (hidden @ linear.lora_b.t())
    if linear.bias is not None:
        y += linear.bias
    return y @ linear.basis.to(y.dtype).t() if hasattr(linear, "basis") else y


def row_vjp(linear: Any, x_TBF: Tensor | None, dy_SBE: Tensor, sums: Gradients) -> Tensor:
    """dx [T, B, F / ranks]; adds the parameters' gradients to `sums`. x may be None as in `column_vjp`."""
    if hasattr(linear, "basis"):
        dy_SBE = dy_SBE @ linear.basis.to(dy_SBE.dtype)
    dy_TBE = _gather(dy_SBE, linear.tp_group) if linear.sequence_parallel else dy_SBE
    dx = dy_TBE @ linear.weight
    if linear.weight.requires_grad:
        assert x_TBF is not None
        sums.add_product(linear.weight, dy_TBE, x_TBF)
    if linear.bias is not None and linear.bias.requires_grad:
        sums.add(linear.bias, dy_SBE.flatten(0, -2).sum(0))
    if hasattr(linear, "lora_a"):
        if linear.lora_b.requires_grad:
            assert x_TBF is not None
            sums.add_product(linear.lora_b, dy_SBE, _row_hidden(linear, x_TBF), linear.lora_scale)
        dh = linear.lora_scale * (dy_TBE @ linear.lora_b)
        if linear.lora_a.requires_grad:
            assert x_TBF is not None
            sums.add_product(linear.lora_a, dh, x_TBF)
        dx += dh @ linear.lora_a
    return dx


def _column_hidden(linear: Any, x_SBE: Tensor) -> Tensor:
    """A x of all tokens [T, B, rank]."""
    hidden = x_SBE @ linear.lora_a.t()
    return _gather(hidden, linear.tp_group) if linear.sequence_parallel else hidden


def _row_hidden(linear: Any, x_TBF: Tensor) -> Tensor:
    """A x summed over ranks [S, B, rank]."""
    pending, hidden = _reduce_start(x_TBF @ linear.lora_a.t(), linear.tp_group, linear.sequence_parallel)
    _wait(pending)
    return hidden


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' tokens in rank order."""
    if group.size() == 1:
        return x
    whole = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    dist.all_gather_into_tensor(whole, x.contiguous(), group=group)
    return whole


def _reduce_start(x: Tensor, group: dist.ProcessGroup, scatter: bool) -> tuple[Any, Tensor]:
    """Start summing x over the ranks; with `scatter` each keeps its own tokens. The sum is whole after
    `_wait`."""
    if group.size() == 1:
        return None, x
    x = x.contiguous()
    if not scatter:
        return dist.all_reduce(x, group=group, async_op=True), x
    part = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    return (dist.reduce_scatter_tensor(part, x, group=group, async_op=True), x), part


def _wait(pending: Any) -> None:
    if pending is not None:
        (pending[0] if isinstance(pending, tuple) else pending).wait()
