"""One step's forward and backward through mcore's schedules; the loss's sum and count travel apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ltrain.model.language_model import LanguageModel
from ltrain.parallel import seam
from ltrain.parallel.mesh import Mesh
from ltrain.train.batch import MicroBatch
from ltrain.train.group_times import GroupTimes


def wrap_ddp(model: LanguageModel, *, distributed_optimizer: bool, overlap: bool) -> DistributedDataParallel:
    """Wrap a model stage in mcore's DDP: gradients accumulate and are reduced in fp32."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        use_distributed_optimizer=distributed_optimizer,
        average_in_collective=False,
    )
    with seam.cpu_seam():
        ddp = DistributedDataParallel(config=model.config, ddp_config=config, module=model)
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.calculate_per_token_loss = True
    return ddp


@dataclass(frozen=True)
class StepResult:
    """The step's global loss: mean over `num_targets` target tokens of all ranks."""

    loss: float
    num_targets: int


def run_model(
    ddp: DistributedDataParallel,
    mesh: Mesh,
    batches: list[MicroBatch],
    *,
    train: bool,
    on_losses: Callable[[MicroBatch, Tensor], None] | None = None,
    times: GroupTimes | None = None,
) -> Tensor:
    """Forward, and in training backward, of this rank's micro-batches.

    Every rank of a pipeline passes the same number of micro-batches. `on_losses(batch, nll)` sees each
    micro-batch's token losses [T_local] on the last stage; `times` is marked at every micro-batch of a
    training step and at the end of the last. Returns this rank's [sum of losses, number of
    targets], fp64; zeros on other stages than the last.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=mesh.device)

    def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)
        with seam.outside_seam():
            if times is not None and train:
                times.mark(batch.context.group)
            output = model(
                input_ids=batch.tokens,
                position_ids=None,
                attention_mask=None,
                labels=batch.labels,
                packed_seq_params=batch.context,
            )

        def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            with torch.no_grad():
                totals[0] += output[1:].sum(dtype=torch.float64)
                totals[1] += batch.num_targets
                if on_losses is not None:
                    on_losses(batch, output[1:].detach())
            count = torch.tensor(batch.num_targets, dtype=torch.int, device=mesh.device)
            # A copy: mcore frees what a stage returns, and refuses to free a view.
            return output[0].clone(), count, {}

        return output, loss

    config = ddp.config
    finalize = config.finalize_model_grads_func

    def stop_and_finalize(*args: Any, **kwargs: Any) -> Any:
        with seam.outside_seam():
            if times is not None:
                times.stop()
        return finalize(*args, **kwargs)

    longest = max((batch.tokens.shape[1] for batch in batches), default=0)
    try:
        if times is not None:
            config.finalize_model_grads_func = stop_and_finalize
        with seam.cpu_seam():
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(batches),
                model=[ddp],
                num_microbatches=len(batches),
                seq_length=longest * mesh.context.size,
                micro_batch_size=1,
                forward_only=not train,
            )
    finally:
        config.finalize_model_grads_func = finalize
    return totals


def reduce_totals(totals: Tensor, mesh: Mesh) -> StepResult:
    """Sum losses and counts, apart, over all ranks that hold different tokens."""
    if mesh.pipeline.size > 1:
        dist.all_reduce(totals, group=mesh.pipeline.group)  # zeros on all stages but the last
    dist.all_reduce(totals, group=mesh.data_context.group)
    total, count = totals.tolist()
    return StepResult(total / max(count, 1), int(count))
