"""The arithmetic of parallel degrees."""

from __future__ import annotations

from ltrain.config.base import ConfigError


def check_world(world_size: int, *, tensor: int, pipeline: int, context: int) -> int:
    """The data-parallel degree. Raises ConfigError where the degrees do not multiply to the world size."""
    product = tensor * pipeline * context
    if world_size % product:
        raise ConfigError(
            "parallel.tensor x pipeline x context.degree",
            f"{tensor} x {pipeline} x {context} = {product}",
            f"must divide the world size {world_size}",
            f"launch {product * max(1, world_size // product)} processes or change the degrees",
        )
    return world_size // product


def rows_per_step(tokens_per_step: int, seq_len: int, data_size: int) -> int:
    """Rows of one step. Raises ConfigError where they cannot be dealt evenly over the data axis."""
    unit = seq_len * data_size
    if tokens_per_step % unit:
        lower = max(unit, tokens_per_step // unit * unit)
        raise ConfigError(
            "train.tokens_per_step",
            tokens_per_step,
            f"must be a multiple of train.seq_len x data-parallel degree = {seq_len} x {data_size} = {unit}",
            f"use {lower}" + (f" or {lower + unit}" if lower + unit != lower else ""),
        )
    return tokens_per_step // seq_len
