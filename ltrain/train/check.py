"""`ltrain check`: what a run would do, and whether it can, without starting it."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import torch

from ltrain.config.base import ConfigError
from ltrain.config.schema import RunConfig
from ltrain.model.flops import flops_per_token
from ltrain.model.memory import GIB, estimate_memory, longest_context
from ltrain.train.plan import Plan, check_run, run_folder


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
    yield (
        "layout",
        f"tensor {parallel.tensor} x context {context.degree} x data {plan.data_size} x pipeline "
        f"{parallel.pipeline} = {world_size} ranks",
    )
    yield "attention", f"{context.schedule} exchange, {context.layout} layout, blocks of {context.block}"
    micro = plan.rows // plan.data_size
    yield (
        "step",
        f"{train.tokens_per_step:,} tokens = {train.seq_len:,} a row x {micro} micro-batches x "
        f"{plan.data_size} data-parallel ranks",
    )
    yield "training", f"{train.steps:,} steps, {train.steps * train.tokens_per_step / 1e6:,.1f} M tokens"
    flops = flops_per_token(spec, train.seq_len)
    yield "FLOPs a token", f"{flops / 1e9:,.3f} G (forward and backward, one document of {train.seq_len:,})"
    shards = plan.data_size * context.degree if config.optimizer.distributed else 1
    facts = {
        "bf16": train.dtype == "bf16",
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "shards": shards,
        "loss_chunk_tokens": train.loss_chunk_tokens,
    }
    tokens = -(-train.seq_len // context.degree)
    memory = estimate_memory(spec, tokens=tokens, **facts)
    yield (
        "memory a rank",
        f"{memory.total / GIB:.2f} GiB = parameters {memory.parameters / GIB:.2f} + gradients "
        f"{memory.gradients / GIB:.2f} + optimizer {memory.optimizer / GIB:.2f} + activations "
        f"{memory.activations / GIB:.2f} + loss {memory.loss / GIB:.2f}",
    )
    longest = longest_context(spec, device_gib * GIB, context=context.degree, **facts)
    verdict = "fits" if train.seq_len <= longest else "does NOT fit"
    yield "longest context", f"about {longest:,} tokens in {device_gib:.0f} GiB a rank: seq_len {verdict}"


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

    table = Table.grid(padding=(0, 2))
    for topic, text in check_lines(config, plan, world_size, device_gib or default_device_gib(world_size)):
        table.add_row(f"[bold]{topic}[/bold]", text)
    Console().print(table)
    return 0
