"""`ltrain calibrate-elimination`: what each layer's ratio costs, and ratios for a budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ltrain.config.base import ConfigError
from ltrain.config.elimination import BlockElimination
from ltrain.config.schema import RunConfig
from ltrain.elimination.budget import LEVELS, allocate
from ltrain.elimination.ratios import write_ratios
from ltrain.model.flops import step_flops
from ltrain.model.memory import bytes_per_token_layer
from ltrain.model.spec import ModelSpec
from ltrain.train.plan import memory_setting

log = logging.getLogger("ltrain")


def calibrate(
    config: RunConfig, *, target_bytes: float | None, target_flops: float | None, rows: int, out: Path
) -> int:
    """Measure the training loss with one sparse layer at a time, allocate, check the joint loss, write `out`.

    A target is a share of the dense run's saved activation bytes, or FLOPs. Works on any layout, under
    torchrun on all its ranks; the first `rows` rows of the run's data are used, without training. Raises
    ConfigError on a target that the mode can't save for.
    """
    from ltrain.parallel.mesh import init_process_group
    from ltrain.train.build import build_run
    from ltrain.train.main import set_seed
    from ltrain.train.step import reduce_totals, run_model

    section, target, cost_name = _checked(config, target_bytes, target_flops)
    # Any ratios do to build the run: they are set for every measurement.
    section = section.model_copy(update={"ratio": 0.5, "dense_layers": (), "anneal": 0.0})
    init_process_group(config.train.timeout_s)
    set_seed(config.run.seed)
    run = build_run(config.model_copy(update={"elimination": section}))
    assert run.elimination is not None
    data: list[Any] = []
    while len(data) < rows:
        data += run.loader.next_step().rows
    data = data[: max(rows, run.mesh.data.size) // run.mesh.data.size * run.mesh.data.size]
    layers = run.spec.num_layers
    run.ddp.train()

    def loss(ratios: Sequence[float]) -> float:
        run.elimination.ratios = tuple(ratios)
        with torch.no_grad():
            totals = run_model(run.ddp, run.mesh, run.assignment.batches(data), train=False)
        return reduce_totals(totals, run.mesh).loss

    dense = loss([1.0] * layers)
    rises = []
    for layer in range(layers):
        row = [0.0]
        for ratio in LEVELS[1:]:
            row.append(loss([ratio if i == layer else 1.0 for i in range(layers)]) - dense)
        rises.append(row)
        if dist.get_rank() == 0:
            shown = ", ".join(f"{ratio:g}: {rise:+.4f}" for ratio, rise in zip(LEVELS, row, strict=True))
            log.info("layer %d: %s", layer, shown)
    cost = cost_of(run.spec, config, section.mode, cost_name)
    found = allocate(rises, cost, target)
    joint = loss(found.ratios) - dense
    if dist.get_rank() == 0:
        facts = {
            "mode": section.mode, "scorer": section.scorer.kind, "cost": cost_name, "target": target,
            "reached_share": found.share, "dense_loss": dense, "rise_of_each_alone": found.predicted_loss,
            "rise_together": joint, "rows": len(data), "seq_len": config.train.seq_len, "measured": rises,
        }  # fmt: skip
        write_ratios(out, found.ratios, facts)
        log.info(
            "%s: %.3f of the dense %s, loss %.4f %+.4f together (%+.4f as a sum)",
            out, found.share, cost_name, dense, joint, found.predicted_loss,
        )  # fmt: skip
        if not found.reached:
            log.warning("the target %.3f is out of reach with ratios of at least %g", target, LEVELS[-1])
    dist.destroy_process_group()
    return 0


def cost_of(spec: ModelSpec, config: RunConfig, mode: str, name: str) -> Callable[[Sequence[float]], float]:
    """Cost of a token's training by layer ratios: saved bytes at the run's memory level, or FLOPs."""
    length = config.train.seq_len
    setting = replace(memory_setting(config, spec, data_size=1), mode=mode)

    def nbytes(ratios: Sequence[float]) -> float:
        return bytes_per_token_layer(spec, replace(setting, kept=ratios))

    def flops(ratios: Sequence[float]) -> float:
        power = 1 if mode == "q" else 2
        densities = [ratio**power for ratio in ratios]
        flops = step_flops(
            spec, [length], densities=densities, kept=ratios, mode=mode, memory_level=config.memory.level
        )
        return flops.executed

    return nbytes if name == "bytes" else flops


def _checked(
    config: RunConfig, target_bytes: float | None, target_flops: float | None
) -> tuple[BlockElimination, float, str]:
    section = config.elimination
    if not isinstance(section, BlockElimination):
        raise ConfigError(
            "elimination.kind", section.kind, "must be blocks: its mode and scorer are measured"
        )
    given = [(t, n) for t, n in ((target_bytes, "bytes"), (target_flops, "FLOPs")) if t is not None]
    if len(given) != 1:
        raise ConfigError("--target-bytes, --target-flops", len(given), "must be given, one of the two")
    target, name = given[0]
    option = "--target-bytes" if name == "bytes" else "--target-flops"
    if not 0 < target < 1:
        raise ConfigError(option, target, "must lie between 0 and 1: a share of the dense cost")
    if section.mode == "q" and name == "bytes":
        rule = "can't be met by mode q, which saves as many bytes as dense"
        raise ConfigError(option, target, rule, "give --target-flops")
    return section, target, name
