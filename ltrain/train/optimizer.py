"""mcore's optimizers from the configuration, the learning-rate schedule, and one guarded step."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as McoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from ltrain.config.base import ConfigError
from ltrain.config.train import (
    AdamW,
    ConstantSchedule,
    CosineSchedule,
    CPUAdam,
    LinearSchedule,
    ScheduleConfig,
    WSDSchedule,
)
from ltrain.parallel import seam


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`: a pure function, so that a resumed run has
    it.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if isinstance(schedule, ConstantSchedule):
        return peak
    floor = schedule.min_lr_ratio
    if isinstance(schedule, WSDSchedule):
        start = max(warmup, total_steps - schedule.decay_steps)
        length = total_steps - start
    else:
        start, length = warmup, total_steps - warmup
    done = 0.0 if step < start else min(1.0, (step - start + 1) / max(length, 1))
    if isinstance(schedule, CosineSchedule):
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
    assert isinstance(schedule, (LinearSchedule, WSDSchedule))
    return peak * (1 - (1 - floor) * done)


def build_optimizer(config: AdamW | CPUAdam, model: list[Any], *, bf16: bool) -> Any:
    """mcore's optimizer over DDP-wrapped `model` chunks.

    `cpu_adam` steps with DeepSpeed's vectorised CPU Adam, on a GPU with the fp32 parameters and moments in
    host memory. Raises ConfigError where DeepSpeed's operator cannot be built.
    """
    offload = isinstance(config, CPUAdam)
    on_gpu = not seam.on_cpu()
    mcore_config = McoreOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=0.0,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.distributed,
        clip_grad=config.max_grad_norm,
        optimizer_cpu_offload=offload and on_gpu,
        optimizer_offload_fraction=1.0 if offload and on_gpu else 0.0,
    )
    if offload:
        adam = _deepspeed_adam()
    with seam.cpu_seam():
        if offload and on_gpu:
            import megatron.core.optimizer as mcore_optimizer

            mcore_optimizer.CPUAdam = lambda groups, fused=False, **kwargs: adam(groups, **kwargs)
        optimizer = get_megatron_optimizer(
            mcore_config,
            model,
            config_overrides=get_standard_config_overrides(mcore_config),
            use_gloo_process_groups=False,
        )
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if inner is None or (offload and on_gpu):
            continue
        if offload:
            part.optimizer = _over_groups(adam, inner.param_groups)
        elif isinstance(inner, torch.optim.AdamW):
            # mcore falls back to torch's loop over parameters where Apex is missing; the fused step is one
            # pass.
            for group in inner.param_groups:
                group["fused"], group["foreach"] = True, False
    return optimizer


def _over_groups(adam: Any, groups: list[dict[str, Any]]) -> Any:
    """An optimizer of class `adam` over existing groups.

    mcore's shards are views of parameters, which a constructor refuses as not being leaves; they are handed
    over after it, with the defaults that the class adds.
    """
    optimizer = adam([torch.nn.Parameter(torch.zeros(1))])
    for group in groups:
        for name, value in optimizer.defaults.items():
            group.setdefault(name, value)
    optimizer.param_groups = groups
    return optimizer


def _deepspeed_adam() -> Any:
    # The build calls ninja, which lies beside the interpreter of a virtual environment that isn't activated.
    folder = str(Path(sys.executable).parent)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", "")])
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        from deepspeed.ops.op_builder import CPUAdamBuilder

        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # the builder raises whatever the compiler did
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            "optimizer.kind",
            "cpu_adam",
            f"needs DeepSpeed's CPU Adam, which cannot be built here ({reason})",
            "install a C++ compiler and ninja, or use adamw",
        ) from None
    return DeepSpeedCPUAdam


@dataclass(frozen=True)
class OptimizerStep:
    """What one step did. `grad_norm` is global, before clipping; `skipped` steps changed no parameter."""

    grad_norm: float
    skipped: bool


def set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def optimizer_step(optimizer: Any, max_grad_norm: float) -> OptimizerStep:
    """Clip by the global norm and step; skip the step, on all ranks alike, where the norm is not finite."""
    with seam.cpu_seam():
        optimizer.prepare_grads()
        norm = float(optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return OptimizerStep(norm, skipped=True)
        if max_grad_norm > 0:
            for part in optimizer.chained_optimizers:
                if not part.is_stub_optimizer:
                    clip_grad_by_total_norm_fp32(
                        part.get_parameters(), max_norm=max_grad_norm, total_norm=norm
                    )
        optimizer.step_with_ready_grads()
    return OptimizerStep(norm, skipped=False)
