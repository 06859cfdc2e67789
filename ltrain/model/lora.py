"""Low-rank adapters inside mcore's tensor-parallel linears.

LoRA, arXiv 2106.09685. A fused linear (queries, keys and values; gate and up) has one A, so its exported
adapter has the same A for each part and rows of B for each.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from ltrain.config.model import LoraAdapter
from ltrain.model.sharding import Piece, Shard, hf_shapes, stage_shards
from ltrain.model.spec import ModelSpec
from ltrain.parallel.mesh import Mesh

MODULES = {
    "qkv": "self_attention.linear_qkv",
    "o": "self_attention.linear_proj",
    "gate_up": "mlp.linear_fc1",
    "down": "mlp.linear_fc2",
}
ROW_PARALLEL = ("o", "down")


class _Lora:
    """What both kinds of linear share; mixed into a linear that has `weight`."""

    weight: nn.Parameter
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    def _add_adapter(self, lora: LoraAdapter) -> None:
        rows, columns = self.weight.shape
        like: dict[str, Any] = {"dtype": self.weight.dtype, "device": self.weight.device}
        self.lora_a = nn.Parameter(torch.empty(lora.rank, columns, **like))
        self.lora_b = nn.Parameter(torch.zeros(rows, lora.rank, **like))
        self.lora_scale = lora.alpha / lora.rank

    def merged_weight(self) -> Tensor:
        """This rank's shard of W + alpha / rank * B A, fp32 inside, in the weight's type."""
        update = self.lora_scale * (self.lora_b.float() @ self.lora_a.float())
        return (self.weight.float() + update).to(self.weight.dtype)


def _mark_shard(parameter: nn.Parameter, dim: int, stride: int = 1) -> None:
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = dim  # type: ignore[attr-defined]
    parameter.partition_stride = stride  # type: ignore[attr-defined]


class LoraColumnParallelLinear(ColumnParallelLinear, _Lora):
    """Column-parallel: A is whole on every rank, B is split by rows like the weight.

    The rank-sized A x travels instead of x: summed in the backward, or gathered under sequence parallelism.
    """

    def __init__(self, *args: Any, lora: LoraAdapter, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._add_adapter(lora)
        _mark_shard(self.lora_b, 0)
        self.lora_a.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        hidden = F.linear(input_, self.lora_a)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)
        return output + self.lora_scale * F.linear(hidden, self.lora_b), bias


class LoraRowParallelLinear(RowParallelLinear, _Lora):
    """Row-parallel: A is split by columns like the weight, B is whole on every rank.

    The partial sums of A x are reduced, not those of B A x.
    """

    def __init__(
        self, *args: Any, lora: LoraAdapter, bias: bool = False, always_bias: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, bias=bias or always_bias, **kwargs)
        self._add_adapter(lora)
        _mark_shard(self.lora_a, 1)
        self.lora_b.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        hidden = F.linear(input_, self.lora_a)
        if self.sequence_parallel:
            hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        else:
            hidden = reduce_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        return output + self.lora_scale * F.linear(hidden, self.lora_b), bias


def adapter_shards(
    spec: ModelSpec, lora: LoraAdapter, *, stage: int, stages: int, tensor_rank: int, tensor_size: int
) -> dict[str, Shard]:
    """Every adapter parameter of a rank, with the `peft` tensors that its pieces belong to."""
    place = {"stage": stage, "stages": stages, "tensor_rank": tensor_rank, "tensor_size": tensor_size}
    weights = stage_shards(spec, **place)
    shards: dict[str, Shard] = {}
    for layer in range(spec.num_layers // stages):
        for target in lora.targets:
            prefix = f"decoder.layers.{layer}.{MODULES[target]}."
            weight = weights[prefix + "weight"]
            rows, columns = weight.shape
            names = dict.fromkeys(piece.name for piece in weight.pieces)
            whole_a = tuple(Piece(peft_name(n, "A"), 0, 0, lora.rank, 0) for n in names)
            whole_b = tuple(Piece(peft_name(n, "B"), 0, 0, rows, 0) for n in names)
            split = tuple(
                Piece(peft_name(p.name, "AB"[p.dim == 0]), p.dim, p.start, p.stop, p.offset)
                for p in weight.pieces
            )
            row_parallel = target in ROW_PARALLEL
            shards[prefix + "lora_a"] = Shard((lora.rank, columns), split if row_parallel else whole_a)
            shards[prefix + "lora_b"] = Shard((rows, lora.rank), whole_b if row_parallel else split)
    return shards


def peft_name(hf_name: str, part: str) -> str:
    """The name of A or B of a Hugging Face linear's weight in an adapter file of `peft`."""
    return f"base_model.model.{hf_name.removesuffix('.weight')}.lora_{part}.weight"


def adapter_shapes(spec: ModelSpec, lora: LoraAdapter) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the `peft` adapter."""
    whole = hf_shapes(spec)
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in adapter_shards(spec, lora, stage=0, stages=1, tensor_rank=0, tensor_size=1).values():
        for piece in shard.pieces:
            hf = piece.name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] + ".weight"
            rows, columns = whole[hf]
            shapes[piece.name] = (lora.rank, columns) if ".lora_A." in piece.name else (rows, lora.rank)
    return shapes


@torch.no_grad()
def init_adapter(model: nn.Module, spec: ModelSpec, lora: LoraAdapter, mesh: Mesh, *, seed: int) -> None:
    """A uniform in +-1/sqrt(columns), B zero: the model starts as its base. Independent of the layout."""
    shards = adapter_shards(
        spec,
        lora,
        stage=mesh.pipeline.rank,
        stages=mesh.pipeline.size,
        tensor_rank=mesh.tensor.rank,
        tensor_size=mesh.tensor.size,
    )
    parameters = dict(model.named_parameters())
    for name, shard in shards.items():
        if name.endswith("lora_b"):
            parameters[name].zero_()
            continue
        piece = shard.pieces[0]
        columns = shard.shape[1] * (mesh.tensor.size if piece.dim == 1 else 1)
        digest = hashlib.sha256(f"{seed}:{piece.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        whole = torch.empty(lora.rank, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
        start = piece.start if piece.dim == 1 else 0
        parameters[name].copy_(whole.narrow(1, start, shard.shape[1]))
