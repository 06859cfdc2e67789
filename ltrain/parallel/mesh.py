"""Process groups as one value: the axes of a run, their sizes, this process's place on them."""

from __future__ import annotations

import itertools
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from ltrain.parallel import seam
from ltrain.parallel.degrees import check_world


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh; `rank` is relative to `group`, `ranks` are the global ranks along it."""

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Mesh:
    """The axes of a run.

    Fastest-varying first the order is tensor, context, data, pipeline (mcore's default). `data_context` is
    the product of data and context: the ranks that hold the same parameters, over which gradients are summed.
    """

    tensor: Axis
    context: Axis
    data: Axis
    pipeline: Axis
    data_context: Axis
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline.rank == self.pipeline.size - 1

    def describe(self) -> str:
        axes = (self.tensor, self.context, self.data, self.pipeline)
        return " x ".join(f"{axis.name} {axis.size}" for axis in axes) + f" = {self.world_size} ranks"


def ranks_per_node(axis: Axis) -> int | None:
    """How many consecutive ranks of the axis share a host; None for one host, or where hosts hold unequal or
    scattered ranks. Collective over the axis.
    """
    hosts: list[str] = [""] * axis.size
    dist.all_gather_object(hosts, socket.gethostname(), group=axis.group)
    runs = [len(list(run)) for _, run in itertools.groupby(hosts)]
    whole = len(runs) == len(set(hosts)) and len(set(runs)) == 1
    return runs[0] if whole and len(runs) > 1 else None


def init_process_group(timeout_s: float) -> None:
    """Join the default group from torchrun's environment, or a group of one: NCCL or, without a GPU, gloo."""
    if not seam.on_cpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    seam.install()
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo" if seam.on_cpu() else "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def init_mesh(*, tensor: int = 1, pipeline: int = 1, context: int = 1, timeout_s: float = 600.0) -> Mesh:
    """Build mcore's process groups over the initialised default group. Raises ConfigError on a wrong world
    size.
    """
    # Here and not above, so that checking a configuration doesn't import mcore.
    from megatron.core import parallel_state

    world_size = dist.get_world_size()
    check_world(world_size, tensor=tensor, pipeline=pipeline, context=context)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    with seam.cpu_seam():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
            distributed_timeout_minutes=max(1, round(timeout_s / 60)),
            create_gloo_process_groups=False,
        )

    def axis(name: str, group: dist.ProcessGroup) -> Axis:
        ranks = tuple(dist.get_process_group_ranks(group))
        return Axis(name, len(ranks), dist.get_group_rank(group, dist.get_rank()), group, ranks)

    return Mesh(
        tensor=axis("tensor", parallel_state.get_tensor_model_parallel_group()),
        context=axis("context", parallel_state.get_context_parallel_group()),
        data=axis("data", parallel_state.get_data_parallel_group()),
        pipeline=axis("pipeline", parallel_state.get_pipeline_model_parallel_group()),
        data_context=axis("data_context", parallel_state.get_data_parallel_group(with_context_parallel=True)),
        rank=dist.get_rank(),
        world_size=world_size,
        device=seam.device(),
    )
