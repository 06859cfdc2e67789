"""The planner's cost model of a run: what is known before a measurement, and the measurement."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ltrain.attention import patterns
from ltrain.config.planner import GivenCost, PlannedAssignment
from ltrain.config.schema import RunConfig
from ltrain.model.flops import linear_flops_per_token, pair_flops
from ltrain.model.spec import ModelSpec
from ltrain.planner.cost import CostModel
from ltrain.planner.setup import cost_model
from ltrain.planner.work import DenseWork, MixedWork, TableWork, WindowWork, Work

# FLOP/s of a rank before anything is measured: about a CPU core.
_NOMINAL_FLOPS = 1e11
# What a measurement finds; everything else of a cost model follows from the configuration.
CONSTANTS = ("attention_s", "linear_s", "fixed_s", "overlap", "exchange_scale", "num_exchanges")


def attention_work(config: RunConfig, spec: ModelSpec) -> Work:
    """Work of the model's layers by document length: their windows, and what a static pattern selects.

    A pattern that selects online counts as dense: how much it keeps is not known before it runs.
    """
    pattern = patterns.from_config(config.attention.pattern)
    parts: dict[Work, float] = {}
    for layer, window in enumerate(spec.windows):
        work: Work = DenseWork() if window is None else WindowWork(window)
        if window is None and pattern.static and not pattern.is_dense_layer(layer, spec.num_layers):
            work = _pattern_work(config, spec, layer)
        parts[work] = parts.get(work, 0.0) + 1.0 / spec.num_layers
    if len(parts) == 1:
        return next(iter(parts))
    return MixedWork(tuple((share, work) for work, share in parts.items()))


def _pattern_work(config: RunConfig, spec: ModelSpec, layer: int) -> Work:
    pattern = patterns.from_config(config.attention.pattern)
    block = config.parallel.context.block
    lengths, found = [], []
    length = block
    while length < 2 * config.train.seq_len:
        index = pattern.index(
            num_tokens=length,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            block=block,
            layer=layer,
            num_layers=spec.num_layers,
            device=torch.device("cpu"),
        )
        work = pattern.density(index, num_tokens=length) * float(length) ** 2
        if not found or work > found[-1]:
            lengths.append(length)
            found.append(work)
        length *= 2
    return TableWork(tuple(lengths), tuple(found)) if len(found) > 1 else DenseWork()


def base_cost(config: RunConfig, section: PlannedAssignment, spec: ModelSpec) -> CostModel:
    """The cost model with the given constants, or, where they are to be measured, without meaning in them."""
    tensor = config.parallel.tensor
    heads, kv_heads = spec.num_heads // tensor, max(1, spec.num_kv_heads // tensor)
    work = attention_work(config, spec)
    if isinstance(section.cost, GivenCost):
        return cost_model(section, work=work, num_heads=heads, num_kv_heads=kv_heads)
    element = 2 if config.train.dtype == "bf16" else 4
    return CostModel(
        attention_s=1.0,
        linear_s=1.0,
        fixed_s=1.0,
        # Four tensors of the queries' size in each pass: q, k, v and the output.
        bytes_per_token=8.0 * element * spec.num_layers * spec.q_size / tensor,
        work=work,
        num_heads=heads,
        num_kv_heads=kv_heads,
        schedules=section.schedules,
    )


def nominal_cost(config: RunConfig, section: PlannedAssignment, spec: ModelSpec) -> CostModel:
    """The cost model from FLOPs, at one rate for all, where it is to be measured; the given one else."""
    cost = base_cost(config, section, spec)
    if isinstance(section.cost, GivenCost):
        return cost
    ranks = config.parallel.tensor * config.parallel.pipeline * _NOMINAL_FLOPS
    # Half of the pairs are causal; a backward pass costs two forward passes.
    attention = 3 * pair_flops(spec) * spec.num_layers / 2
    linear = 3 * linear_flops_per_token(spec)
    return dataclasses.replace(cost, attention_s=attention / ranks, linear_s=linear / ranks, fixed_s=0.0)


def constants(cost: CostModel) -> dict[str, float]:
    """What a measurement found, for a checkpoint."""
    return {name: float(getattr(cost, name)) for name in CONSTANTS}


def with_constants(cost: CostModel, found: dict[str, Any]) -> CostModel:
    return dataclasses.replace(cost, **{name: float(found[name]) for name in CONSTANTS})
