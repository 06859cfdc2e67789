"""Weights in and out: Hugging Face folders to sharded parameters and back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltrain.config.base import ConfigError
from ltrain.model.export_files import FolderWriter, SavesTokenizer
from ltrain.model.sharding import Shard, hf_shapes, stage_shards
from ltrain.model.sources import RandomSource, SafetensorsSource, WeightSource
from ltrain.model.spec import ModelSpec
from ltrain.parallel.mesh import Mesh

log = logging.getLogger("ltrain")


def check_weights(spec: ModelSpec) -> None:
    """Raise ConfigError, naming file and tensor, unless `spec.source` holds exactly this model's tensors.

    Reads the headers only.
    """
    assert spec.source is not None
    with SafetensorsSource(spec.source, spec):
        pass


def import_model(model: nn.Module, spec: ModelSpec, mesh: Mesh, *, seed: int = 0) -> None:
    """Fill this rank's stage and shard from `spec.source`, or from random numbers by `seed` if it has none.

    Only the slices that the rank holds are read; values are cast to the parameters' type. No communication.
    """
    shards = _local_shards(spec, mesh)
    if spec.source is None:
        fill(model, shards, RandomSource(spec, seed))
        return
    with SafetensorsSource(spec.source, spec) as source:
        fill(model, shards, source)


@torch.no_grad()
def fill(model: nn.Module, shards: dict[str, Shard], source: WeightSource) -> None:
    """Copy every shard's pieces from `source` into the parameter of that name; padding becomes zero."""
    for name, parameter in base_parameters(model, shards).items():
        shard = shards[name]
        filled = sum(piece.stop - piece.start for piece in shard.pieces)
        if not shard.pieces or filled < shard.shape[shard.pieces[0].dim]:
            parameter.zero_()
        for piece in shard.pieces:
            values = source.read(piece.name, piece.dim, piece.start, piece.stop)
            parameter.narrow(piece.dim, piece.offset, piece.stop - piece.start).copy_(values)


def base_parameters(model: nn.Module, shards: dict[str, Shard]) -> dict[str, nn.Parameter]:
    """The model's parameters by name, adapters left out, checked against the map."""
    parameters = {name: p for name, p in model.named_parameters() if ".lora_" not in name}
    if set(parameters) != set(shards):
        raise RuntimeError(f"parameters and map differ: {sorted(set(parameters) ^ set(shards))}")
    for name, parameter in parameters.items():
        if tuple(parameter.shape) != shards[name].shape:
            raise RuntimeError(
                f"{name} has shape {tuple(parameter.shape)}, the map says {shards[name].shape}"
            )
    return {name: parameters[name] for name in shards}


def export_model(
    model: nn.Module,
    spec: ModelSpec,
    mesh: Mesh,
    folder: Path,
    *,
    tokenizer: SavesTokenizer | None = None,
    max_file_bytes: int = 4 << 30,
) -> None:
    """Write the model as a Hugging Face folder that replaces `folder` only once it is whole. Collective.

    Rank 0 receives one parameter at a time and holds at most about one file (`max_file_bytes`) in memory. The
    tensors keep the parameters' type. Raises OSError or ConfigError, on every rank, where the folder can't be
    written.
    """
    parameters = base_parameters(model, _local_shards(spec, mesh))
    dtype = next(iter(parameters.values())).dtype
    owners = _owners(mesh)
    failure: list[Any] = [None]
    if mesh.rank == 0:
        try:
            writer = FolderWriter(folder, spec, hf_shapes(spec), dtype, max_file_bytes)
        except (OSError, ConfigError) as error:
            failure[0] = error
    _raise_together(failure)
    if mesh.rank != 0:
        if owners.get((mesh.pipeline.rank, mesh.tensor.rank)) == mesh.rank:
            for parameter in parameters.values():
                dist.send(_as_bytes(parameter), dst=0)
    else:
        for stage in range(mesh.pipeline.size):
            by_rank = [_shards(spec, mesh, stage, t) for t in range(mesh.tensor.size)]
            for name in by_rank[0]:
                for t in range(mesh.tensor.size):
                    value = _receive(by_rank[t][name], owners[stage, t], parameters.get(name), dtype)
                    try:
                        if failure[0] is None:
                            writer.add(by_rank[t][name], value)
                    except (OSError, ConfigError) as error:
                        failure[0] = (
                            error  # the other ranks' sends are still taken, so that none of them hangs
                        )
        try:
            if failure[0] is None:
                writer.finish(tokenizer)
        except (OSError, ConfigError) as error:
            failure[0] = error
        if failure[0] is not None:
            writer.abandon()
    _raise_together(failure)


def _receive(shard: Shard, owner: int, own: nn.Parameter | None, dtype: torch.dtype) -> Tensor:
    if owner == 0:
        assert own is not None
        return own.detach().cpu()
    buffer = torch.empty(shard.shape, dtype=dtype)
    dist.recv(buffer.view(torch.uint8), src=owner)
    return buffer


def _as_bytes(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().cpu().contiguous().view(torch.uint8)


def _owners(mesh: Mesh) -> dict[tuple[int, int], int]:
    """The lowest global rank that holds each (pipeline stage, tensor-parallel shard)."""
    places: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(places, (mesh.pipeline.rank, mesh.tensor.rank))
    owners: dict[tuple[int, int], int] = {}
    for rank, place in enumerate(places):
        owners.setdefault(place, rank)
    return owners


def _raise_together(failure: list[Any]) -> None:
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise failure[0]


def _local_shards(spec: ModelSpec, mesh: Mesh) -> dict[str, Shard]:
    return _shards(spec, mesh, mesh.pipeline.rank, mesh.tensor.rank)


def _shards(spec: ModelSpec, mesh: Mesh, stage: int, tensor_rank: int) -> dict[str, Shard]:
    return stage_shards(
        spec, stage=stage, stages=mesh.pipeline.size, tensor_rank=tensor_rank, tensor_size=mesh.tensor.size
    )
