"""What of the parameters and the optimizer this rank holds, by global name: the map between any two layouts.

A piece is a run of elements inside a box of a global tensor. Tensor parallelism cuts boxes, the distributed
optimizer cuts runs, pipeline parallelism renumbers layers; context and data parallelism hold copies, of which
one is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltrain.parallel.mesh import Mesh

KINDS = ("param", "main", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Place:
    """Where a run of elements sits in a global tensor.

    The global tensor has shape `shape`; the box starts at `start` and has shape `box`; the run is elements
    [`first`, `last`) of the flattened box.
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    box: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True)
class Piece:
    kind: str
    place: Place
    tensor: Tensor
    written: bool
    """Whether this rank writes the piece; copies are held by other ranks."""


def _boxes(name: str, param: Tensor, mesh: Mesh) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Global shape, start and box of a parameter that may be sharded over the tensor axis.

    Gate and up projections lie one after the other inside each shard, so their leading dimension is split in
    two.
    """
    local = tuple(param.shape)
    if not getattr(param, "tensor_model_parallel", False) or mesh.tensor.size == 1:
        view = (2, local[0] // 2, *local[1:]) if _is_gated(name) else local
        return view, (0,) * len(view), view
    dim = param.partition_dim  # type: ignore[attr-defined]
    if _is_gated(name) and dim == 0:
        local, dim = (2, local[0] // 2, *local[1:]), 1
    shape = tuple(n * mesh.tensor.size if i == dim else n for i, n in enumerate(local))
    start = tuple(n * mesh.tensor.rank if i == dim else 0 for i, n in enumerate(local))
    return shape, start, local


def _is_gated(name: str) -> bool:
    return any(f".linear_fc1.{part}" in name for part in ("weight", "bias", "lora_b"))


def global_name(name: str, layer_offset: int, tied: bool) -> str:
    """A parameter's name in the unsplit model: layers counted over all stages, a tied output named as the
    input.
    """
    name = name.removeprefix("module.")
    if tied and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    return re.sub(r"(decoder\.layers\.)(\d+)", lambda m: f"{m[1]}{int(m[2]) + layer_offset}", name)


def pieces(model: Any, optimizer: Any | None, mesh: Mesh) -> Iterator[Piece]:
    """Every piece that this rank holds: parameters, and with an optimizer its main copies and moments."""
    offset = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    tied = model.share_embeddings_and_output_weights
    seen: set[int] = set()
    where: dict[Tensor, tuple[str, Any, bool]] = {}
    for i, (name, param) in enumerate(model.named_parameters()):
        if id(param) in seen:
            continue
        seen.add(id(param))
        full = global_name(name, offset, tied)
        boxes = _boxes(name, param, mesh)
        sharded = boxes[0] != boxes[2]
        second_copy = tied and name.endswith("output_layer.weight") and not model.pre_process
        owner = (sharded or mesh.tensor.rank == 0) and not second_copy
        where[param] = (full, boxes, owner)
        # Copies over the data and context axes: each parameter is written by one of them in turn.
        writes = owner and i % mesh.data_context.size == mesh.data_context.rank
        count = math.prod(boxes[2])
        yield Piece("param", Place(full, *boxes, 0, count), param.detach(), writes)
    if optimizer is None:
        return
    for part in optimizer.chained_optimizers:
        for param, main, first, last, only in optimizer_runs(part):
            if param not in where:
                continue
            full, boxes, owner = where[param]
            place = Place(full, *boxes, first, last)
            writes = owner and (only or mesh.data_context.rank == 0)
            if (
                main.data_ptr() != param.data_ptr() + first * param.element_size()
                or main.dtype != param.dtype
            ):
                yield Piece("main", place, main.detach(), writes)
            state = part.optimizer.state[main]
            if not state:  # before the first step
                state["step"] = _step_counter(part, main, 0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(main), torch.zeros_like(main)
            for kind in ("exp_avg", "exp_avg_sq"):
                yield Piece(kind, place, state[kind], writes)


def optimizer_runs(part: Any) -> Iterator[tuple[Tensor, Tensor, int, int, bool]]:
    """(model parameter, tensor that the optimizer steps, first, last, whether no other rank has it)."""
    if hasattr(part, "shard_fp32_from_float16_groups"):  # mcore's distributed optimizer
        pairs = (
            (part.model_float16_groups, part.shard_fp32_from_float16_groups),
            (part.model_fp32_groups, part.shard_fp32_groups),
        )
        for model_groups, main_groups in pairs:
            for model_group, main_group in zip(model_groups, main_groups, strict=True):
                for param, main in zip(model_group, main_group, strict=True):
                    run = part._get_model_param_range_map(param)["param"]
                    yield param, main, run.start, run.end, True
    elif hasattr(part, "fp32_from_float16_groups"):
        for model_group, main_group in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            for param, main in zip(model_group, main_group, strict=True):
                yield param, main, 0, param.numel(), False
        for group in part.fp32_from_fp32_groups:
            for param in group:
                yield param, param, 0, param.numel(), False
    elif part.optimizer is not None:
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                yield param, param, 0, param.numel(), False


def optimizer_steps(optimizer: Any) -> int:
    """Number of steps that the optimizer has done (its bias correction needs it)."""
    steps = {
        int(state["step"])
        for part in optimizer.chained_optimizers
        if part.optimizer is not None
        for state in part.optimizer.state.values()
        if "step" in state
    }
    assert len(steps) <= 1, steps
    return steps.pop() if steps else 0


def set_optimizer_steps(optimizer: Any, steps: int) -> None:
    """Give every parameter's state its own step counter of that value."""
    for part in optimizer.chained_optimizers:
        if part.optimizer is None:
            continue
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                part.optimizer.state[param]["step"] = _step_counter(part, param, steps)


def _step_counter(part: Any, param: Tensor, steps: int) -> Any:
    """A parameter's own step counter, as its optimizer keeps it."""
    if not isinstance(part.optimizer, torch.optim.AdamW):
        return steps
    fused = part.optimizer.param_groups[0].get("fused")
    return torch.tensor(float(steps), dtype=torch.float32, device=param.device if fused else "cpu")


def tensor_key(piece: Piece, kind: str | None = None) -> str:
    """A name that no other piece of any rank has, but for copies; `kind` in place of its own."""
    place = piece.place
    at = "_".join(str(n) for n in place.start)
    return f"{kind or piece.kind}/{place.name}/{at}/{place.first}"
