"""Sharded parameters to whole tensors on rank 0, and from there to safetensors files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ltrain.model.sharding import Shard
from ltrain.parallel.mesh import Mesh

ShardMap = dict[str, Shard]


class TensorFiles:
    """Collects slices into tensors and writes each file when all its tensors are there.

    `shapes` names every tensor; `file_of` says which file each goes to.
    """

    def __init__(
        self, folder: Path, shapes: dict[str, tuple[int, ...]], file_of: dict[str, str], dtype: torch.dtype
    ) -> None:
        self.folder, self.dtype, self.file_of = folder, dtype, file_of
        self._shapes = shapes
        self._tensors: dict[str, Tensor] = {}
        self._missing = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        self._left: dict[str, set[str]] = {}
        for name, file in file_of.items():
            self._left.setdefault(file, set()).add(name)

    def add(self, shard: Shard, value: Tensor) -> None:
        """Take one parameter's shard; a slice that came before, from another copy, is not counted again."""
        for piece in shard.pieces:
            if self._missing[piece.name] == 0:
                continue
            if piece.name not in self._tensors:
                self._tensors[piece.name] = torch.empty(self._shapes[piece.name], dtype=self.dtype)
            length = piece.stop - piece.start
            part = value.narrow(piece.dim, piece.offset, length)
            self._tensors[piece.name].narrow(piece.dim, piece.start, length).copy_(part)
            self._missing[piece.name] -= part.numel()
            if self._missing[piece.name] == 0:
                self._complete(piece.name)

    def _complete(self, name: str) -> None:
        file = self.file_of[name]
        self._left[file].discard(name)
        if not self._left[file]:
            tensors = {n: self._tensors.pop(n) for n, f in self.file_of.items() if f == file}
            try:
                save_file(tensors, self.folder / file, metadata={"format": "pt"})
            except Exception as error:  # safetensors wraps the system's error
                raise OSError(f"{self.folder / file} could not be written: {error}") from None

    def check_complete(self) -> None:
        """Every tensor has been written."""
        assert not self._tensors and not any(self._missing.values())

    @property
    def num_bytes(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self._shapes.values()) * self.dtype.itemsize


def gather_to_first(
    mesh: Mesh,
    shards_of: Callable[[int, int], ShardMap],
    values: dict[str, Callable[[], Tensor]],
    dtype: torch.dtype,
    take: Callable[[Shard, Tensor], None],
) -> None:
    """Hand every rank's shards to `take` on global rank 0, one parameter at a time. Collective.

    `shards_of(stage, tensor_rank)` is the map of that rank, `values` this rank's parameters by name, made
    when they are needed.
    """
    owners = _owners(mesh)
    own_place = (mesh.pipeline.rank, mesh.tensor.rank)
    if mesh.rank != 0:
        if owners[own_place] == mesh.rank:
            for name in shards_of(*own_place):
                local = values[name]().detach().to("cpu", dtype).contiguous()
                dist.send(local.view(torch.uint8), dst=0)
        return
    for stage in range(mesh.pipeline.size):
        by_rank = [shards_of(stage, t) for t in range(mesh.tensor.size)]
        for name in by_rank[0]:
            for t, shards in enumerate(by_rank):
                owner = owners[stage, t]
                if owner == 0:
                    take(shards[name], values[name]().detach().to("cpu", dtype))
                    continue
                buffer = torch.empty(shards[name].shape, dtype=dtype)
                dist.recv(buffer.view(torch.uint8), src=owner)
                take(shards[name], buffer)


def _owners(mesh: Mesh) -> dict[tuple[int, int], int]:
    """The lowest global rank that holds each (pipeline stage, tensor-parallel shard)."""
    places: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(places, (mesh.pipeline.rank, mesh.tensor.rank))
    owners: dict[tuple[int, int], int] = {}
    for rank, place in enumerate(places):
        owners.setdefault(place, rank)
    return owners


class FirstRankErrors:
    """Errors of rank 0 in the middle of a collective: kept until it is over, then raised on every rank."""

    def __init__(self, mesh: Mesh) -> None:
        self._rank = mesh.rank
        self.error: Exception | None = None

    def guard(self, work: Callable[[], None]) -> None:
        """On rank 0, do `work` unless an earlier part failed."""
        if self._rank == 0 and self.error is None:
            try:
                work()
            except (OSError, ValueError) as error:
                self.error = error

    def raise_together(self) -> None:
        """Raise rank 0's error, if there is one, on every rank. Collective."""
        box: list[Any] = [self.error]
        dist.broadcast_object_list(box, src=0)
        if box[0] is not None:
            raise box[0]
