"""What can be checked of a run before a process group starts, without building anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from ltrain.attention.rope import Rope
from ltrain.config.schema import RunConfig
from ltrain.data.tokenizer import Tokenizer, load_tokenizer
from ltrain.model.families import extend_rope, resolve_spec
from ltrain.model.freeze import frozen_tensors
from ltrain.model.sources import check_weights
from ltrain.model.spec import ModelSpec
from ltrain.parallel.degrees import check_world, rows_per_step


@dataclass(frozen=True)
class Plan:
    """What a configuration means before anything is started: the model, its degrees, the shape of a step."""

    spec: ModelSpec
    tokenizer: Tokenizer
    data_size: int
    rows: int
    source_rope: Rope


def run_folder(config: RunConfig) -> Path:
    return config.run.output / config.run.name


def context_length(config: RunConfig) -> int:
    """The longest document that the run trains on: what the model's context is afterwards."""
    longest = config.data.max_document_tokens if config.data.document_mask else None
    return min(config.train.seq_len, longest or config.train.seq_len)


def check_run(config: RunConfig, world_size: int) -> Plan:
    """Check everything that needs no process group. Raises ConfigError."""
    parallel = config.parallel
    data_size = check_world(
        world_size, tensor=parallel.tensor, pipeline=parallel.pipeline, context=parallel.context.degree
    )
    tokenizer = load_tokenizer(config.data.tokenizer)
    spec = resolve_spec(config.model, tokenizer_vocab_size=tokenizer.vocab_size)
    source_rope = spec.rope
    spec = extend_rope(spec, config.rope, context_length(config))
    spec.check_parallel(tensor=parallel.tensor, pipeline=parallel.pipeline)
    frozen_tensors(spec, config.model)
    if spec.source is not None:
        check_weights(spec)
    rows = rows_per_step(config.train.tokens_per_step, config.train.seq_len, data_size)
    return Plan(spec, tokenizer, data_size, rows, source_rope)


def write_config(config: RunConfig, folder: Path) -> None:
    """Write the resolved configuration of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    temporary = folder / "config.yaml.tmp"
    temporary.write_text(text)
    temporary.replace(folder / "config.yaml")
