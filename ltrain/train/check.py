"""`ltrain check`: what a run would do, and whether it can, without starting it."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import torch

from ltrain.config.base import ConfigError
from ltrain.config.planner import MeasuredCost, PlannedAssignment
from ltrain.config.schema import RunConfig
from ltrain.data.loader import Loader, open_corpus
from ltrain.data.survey import survey
from ltrain.model.flops import flops_per_token
from ltrain.model.memory import GIB, bytes_per_token_layer, estimate_memory, levels, longest_context
from ltrain.planner.command import compare
from ltrain.planner.explain import comparison_table, plan_table, to_text
from ltrain.planner.setup import cluster_of, plan_options
from ltrain.planner.solve import plan_batch
from ltrain.train.cost import nominal_cost
from ltrain.train.plan import Plan, check_assignment, check_run, memory_setting, run_folder
from ltrain.train.plan_source import lengths_of


def check_lines(
    config: RunConfig, plan: Plan, world_size: int, device_gib: float
) -> Iterator[tuple[str, str]]:
    """(topic, what would happen) of a run on `world_size` ranks with `device_gib` GiB each."""
    spec, train, parallel = plan.spec, config.train, config.parallel
    context = parallel.context
    yield "run", f"{config.run.name} in {run_folder(config)}"
    yield "model", f"{spec.family}, {spec.num_layers} layers, {spec.num_parameters / 1e6:,.1f} M parameters"
    yield "heads", f"{spec.num_heads} query, {spec.num_kv_heads} key/value, of {spec.head_dim}"
    rope = spec.rope.to_hf()["rope_parameters"]
    yield "rope", ", ".join(f"{key} {value}" for key, value in rope.items())
    section = parallel.assignment
    planned = section if isinstance(section, PlannedAssignment) else None
    pool = context.degree * plan.data_size
    axes = f"a pool of {pool} shards" if planned else f"context {context.degree} x data {plan.data_size}"
    yield (
        "layout",
        f"tensor {parallel.tensor} x {axes} x pipeline {parallel.pipeline} = {world_size} ranks",
    )
    exchange = "each group's own" if planned else context.schedule
    yield "attention", f"{exchange} exchange, {context.layout} layout, blocks of {context.block}"
    micro = plan.rows // plan.data_size
    dealt = (
        f"{plan.rows} rows, their documents dealt to groups"
        if planned
        else f"{micro} micro-batches x {plan.data_size} data-parallel ranks"
    )
    yield "step", f"{train.tokens_per_step:,} tokens = {train.seq_len:,} a row x {dealt}"
    yield "training", f"{train.steps:,} steps, {train.steps * train.tokens_per_step / 1e6:,.1f} M tokens"
    found = survey(config.data, plan.tokenizer)
    for source in found:
        yield "data", source.describe()
    share = sum(s.tokens * source.weight for s, source in zip(found, config.data.sources, strict=True))
    passes = train.steps * train.tokens_per_step / max(share * (1 - config.data.holdout), 1)
    yield "passes", f"about {passes:.2g} over the documents that are trained on, before length filters"
    flops = flops_per_token(spec, train.seq_len)
    yield "FLOPs a token", f"{flops / 1e9:,.3f} G (forward and backward, one document of {train.seq_len:,})"
    setting = memory_setting(config, plan.spec, plan.data_size)
    tokens = -(-train.seq_len // context.degree)
    if planned is not None:
        cost = nominal_cost(config, planned, spec)
        tokens = max(cost.tokens_by_island(cluster_of(planned, pool)))
    memory = estimate_memory(spec, tokens, setting)
    ranks = pool if planned else context.degree
    yield (
        "memory a rank",
        f"{memory.total / GIB:.2f} GiB = parameters {memory.parameters / GIB:.2f} + gradients "
        f"{memory.gradients / GIB:.2f} + optimizer {memory.optimizer / GIB:.2f} + activations "
        f"{memory.activations / GIB:.2f} + one layer's workspace {memory.workspace / GIB:.2f} + loss "
        f"{memory.loss / GIB:.2f}",
    )
    longest = longest_context(spec, device_gib * GIB, ranks, setting)
    verdict = "fits" if train.seq_len <= longest else "does NOT fit"
    yield "longest context", f"about {longest:,} tokens in {device_gib:.0f} GiB a rank: seq_len {verdict}"
    for other in levels(setting):
        saved = bytes_per_token_layer(spec, other)
        longest = longest_context(spec, device_gib * GIB, ranks, other)
        chosen = " (this run)" if other.level == setting.level else ""
        yield (
            f"memory.level {other.level}",
            f"{saved:,.0f} bytes saved a token and layer, longest context about {longest:,}{chosen}",
        )


def default_device_gib(world_size: int) -> float:
    """Memory of one rank of this machine: its GPU, or its share of the host's memory."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory / GIB)
    return psutil.virtual_memory().total / GIB / world_size


def print_check(config: RunConfig, world_size: int, device_gib: float | None = None) -> int:
    """Print the check as a table. Returns 0; raises ConfigError where the run cannot be."""
    if world_size < 1:
        raise ConfigError("--world-size", world_size, "must be at least 1")
    plan = check_run(config, world_size)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for topic, text in check_lines(config, plan, world_size, device_gib or default_device_gib(world_size)):
        table.add_row(Text(topic, "bold"), Text(text))
    Console().print(table)
    print_plan(config, plan)
    return 0


def print_plan(config: RunConfig, run: Plan) -> None:
    """Print the plan of the run's first step beside its rivals, where documents are dealt by plans. Raises
    ConfigError where a document fits no group."""
    section = config.parallel.assignment
    if not isinstance(section, PlannedAssignment):
        return
    corpus = open_corpus(config.data, run.tokenizer)
    check_assignment(config, run, corpus)
    train, block = config.train, config.parallel.context.block
    loader = Loader(
        config.data,
        corpus,
        seq_len=train.seq_len,
        tokens_per_step=train.tokens_per_step,
        seed=config.run.seed,
        prefetch=0,
    )
    cluster = cluster_of(section, run.data_size * config.parallel.context.degree)
    cost = nominal_cost(config, section, run.spec)
    sample = plan_batch(lengths_of(loader.next_step().rows), cluster, cost, **plan_options(section, block))
    if isinstance(section.cost, MeasuredCost):
        print("The cost model is measured when the run starts; below it is that of FLOPs at 0.1 TFLOP/s.")
    print(to_text(plan_table(sample), comparison_table(compare(sample, cluster, cost), sum(sample.lengths))))
