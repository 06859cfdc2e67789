"""The CPU seam: what megatron-core 0.16.1 needs in order to run without CUDA, all of it in this file.

mcore names the CUDA device in places that are otherwise device-neutral. On a machine with a GPU nothing here
does anything; without one,

- `torch.cuda.current_device()` answers "cpu" and `torch.cuda.synchronize()` does nothing;
- mcore's RNG tracker forks torch's CPU generator;
- mcore's fused elementwise functions stay uncompiled: none is used, and `torch.compile` at import costs every
  process two seconds;
- inside `cpu_seam()` a `device="cuda"` argument becomes "cpu", `pin_memory=True` is dropped, `Tensor.cuda()`
  is the identity and `Tensor.type()` answers the `torch.cuda.*` name that mcore's optimizers compare with.

The mode costs a Python call per torch function, so it is entered around mcore's own calls only;
`outside_seam()` leaves it again for code of ours that mcore calls back.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def on_cpu() -> bool:
    """Whether this process trains without a GPU."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """The device that this process trains on."""
    return torch.device("cpu") if on_cpu() else torch.device("cuda", torch.cuda.current_device())


def _is_cuda(value: object) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and any(_is_cuda(arg) for arg in args[1:]):
            args = (args[0], *("cpu" if _is_cuda(arg) else arg for arg in args[1:]))
        return func(*args, **kwargs)


def cpu_seam() -> AbstractContextManager[Any]:
    """A context for mcore calls that name the CUDA device. Does nothing where there is a GPU."""
    if not on_cpu():
        return nullcontext()
    install()
    return _CudaMeansCpu()


def outside_seam() -> AbstractContextManager[Any]:
    """A context that leaves `cpu_seam()`, for our own code under an mcore call."""
    return torch._C.DisableTorchFunction() if on_cpu() else nullcontext()


def _compile_nothing_of_mcore() -> None:
    """Make `torch.compile`, where mcore's modules apply it while they are imported, the identity."""
    compile_function = torch.compile

    def maybe_compile(model: Any = None, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("megatron."):
            return model if model is not None else lambda function: function
        return compile_function(model, **kwargs)

    torch.compile = maybe_compile  # type: ignore[assignment]


if on_cpu():
    _compile_nothing_of_mcore()

_installed = False


def install() -> None:
    """Substitute the process-wide functions, once. Does nothing where there is a GPU."""
    global _installed
    if _installed or not on_cpu():
        return
    _installed = True
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]

    from megatron.core.tensor_parallel import random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    def add(self: Any, name: str, seed: int) -> None:
        self._is_initialized = True
        if seed in self.seeds_ or name in self.states_:
            raise ValueError(f"rng state {name!r} with seed {seed} exists already")
        self.seeds_.add(seed)
        before = torch.get_rng_state()
        torch.manual_seed(seed)
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(before)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    random.CudaRNGStatesTracker.add = add
