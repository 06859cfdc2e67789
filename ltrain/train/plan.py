"""What can be checked of a run before a process group starts, without building anything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from ltrain.attention import patterns
from ltrain.attention.profile import Profile
from ltrain.attention.rope import Rope
from ltrain.config.base import ConfigError
from ltrain.config.model import LoraAdapter
from ltrain.config.planner import PlannedAssignment
from ltrain.config.schema import RunConfig
from ltrain.config.stage_links import IdentityLinks, ProjectionLinks, slow_boundaries
from ltrain.data.corpus import Corpus
from ltrain.data.tokenizer import Tokenizer, load_tokenizer
from ltrain.model.families import extend_rope, resolve_spec
from ltrain.model.freeze import count_trained, frozen_tensors
from ltrain.model.memory import Setting
from ltrain.model.pattern_weights import stored_pattern
from ltrain.model.sources import check_weights
from ltrain.model.spec import ModelSpec, Reparametrisation
from ltrain.parallel import seam
from ltrain.parallel.degrees import check_world, rows_per_step
from ltrain.planner.setup import check_longest, cluster_of
from ltrain.train.cost import base_cost
from ltrain.train.elimination import check_run_elimination


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


def check_device(config: RunConfig) -> None:
    """Check what depends on the machine that trains, which need not be the one that plans."""
    if config.memory.level == "offload" and seam.on_cpu():
        rule = "needs a GPU: here activations are in host memory already"
        raise ConfigError("memory.level", "offload", rule, "use full")


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
    spec = with_stage_links(spec, config)
    check_stages(spec, config)
    frozen_tensors(spec, config.model)
    if spec.source is not None:
        check_weights(spec)
    check_run_elimination(config, spec)
    planned = parallel.assignment if isinstance(parallel.assignment, PlannedAssignment) else None
    if planned is not None:
        cluster_of(planned, data_size * parallel.context.degree)
    # Planned rows are cut into documents, which need not divide over the data axis.
    rows = rows_per_step(config.train.tokens_per_step, config.train.seq_len, 1 if planned else data_size)
    pattern = patterns.from_config(config.attention.pattern)
    stored_pattern(spec, pattern)
    if parallel.context.profile is not None:
        Profile.load(parallel.context.profile)
    return Plan(spec, tokenizer, data_size, rows, source_rope)


def with_stage_links(spec: ModelSpec, config: RunConfig) -> ModelSpec:
    """The spec with the layers that `parallel.stage_links` asks for. Raises ConfigError where the model has
    what would leave the subspace, or what two stages hold.
    """
    links = config.parallel.stage_links
    if isinstance(links, IdentityLinks):
        return spec
    name = "parallel.stage_links"
    if links.rank > spec.hidden_size:
        raise ConfigError(f"{name}.rank", links.rank, f"must be in 1..hidden_size={spec.hidden_size}")
    if spec.tie_embeddings:
        rule = "needs a model with an output matrix of its own; this one uses the token embedding"
        raise ConfigError(f"{name}.kind", links.kind, rule)
    if spec.o_bias:
        rule = "needs residual writers without a bias; this model's attention output has one"
        raise ConfigError(f"{name}.kind", links.kind, rule)
    if isinstance(links, ProjectionLinks):
        return spec
    pipeline = config.parallel.pipeline
    slow = slow_boundaries(links, pipeline)
    behind = spec.num_layers - (max(slow) + 1) * (spec.num_layers // pipeline) if slow else spec.num_layers
    if links.free_layers > behind:
        raise ConfigError(
            f"{name}.free_layers",
            links.free_layers,
            f"must be at most {behind}, the layers behind the last compressed boundary",
        )
    return replace(spec, subspace=Reparametrisation(links.rank, links.seed, links.free_layers))


def check_stages(spec: ModelSpec, config: RunConfig) -> None:
    """Refuse stages that the replicas of a run cannot own alike. Raises ConfigError."""
    peers, pipeline = config.sync.peers, config.parallel.pipeline
    if peers is None:
        return
    if peers.stages % pipeline:
        rule = f"must be a multiple of parallel.pipeline={pipeline}"
        fix = "take the longest pipeline of the run's replicas"
        raise ConfigError("sync.peers.stages", peers.stages, rule, fix)
    if spec.num_layers % peers.stages:
        rule = f"must divide the model's number of layers, {spec.num_layers}"
        raise ConfigError("sync.peers.stages", peers.stages, rule)
    if peers.stages > 1 and spec.tie_embeddings:
        rule = "must be 1 for a model whose output matrix is its token embedding: two stages would hold it"
        raise ConfigError("sync.peers.stages", peers.stages, rule)


def longest_part(config: RunConfig, corpus: Corpus) -> int:
    """Tokens of the longest part of a row that is never cut: the longest document, or a whole row."""
    data, seq_len = config.data, config.train.seq_len
    if not data.document_mask:
        return seq_len
    entries = np.concatenate([corpus.train, corpus.held_out])
    return min(int(corpus.lengths(entries).max()), seq_len)


def check_assignment(config: RunConfig, plan: Plan, corpus: Corpus) -> None:
    """Raise ConfigError where the longest document fits no group of a planned assignment."""
    parallel = config.parallel
    section = parallel.assignment
    if not isinstance(section, PlannedAssignment):
        return
    cluster = cluster_of(section, plan.data_size * parallel.context.degree)
    cost = base_cost(config, section, plan.spec)
    longest = longest_part(config, corpus)
    check_longest("document", longest, section, cluster, cost, parallel.context.block)


def memory_setting(config: RunConfig, spec: ModelSpec, data_size: int) -> Setting:
    """What the run's memory depends on beside its model; norms are one operation where there is a GPU."""
    parallel, adapter = config.parallel, config.model.adapter
    return Setting(
        level=config.memory.level,
        bf16=config.train.dtype == "bf16",
        tensor=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        pipeline=parallel.pipeline,
        shards=data_size * parallel.context.degree if config.optimizer.distributed else 1,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        adapter=adapter if isinstance(adapter, LoraAdapter) else None,
        fused_norm=not seam.on_cpu(),
        trained=count_trained(spec, config.model),
        pattern=patterns.from_config(config.attention.pattern),
        block=parallel.context.block,
        context=parallel.context.degree,
    )


def write_config(config: RunConfig, folder: Path) -> None:
    """Write the resolved configuration of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    temporary = folder / "config.yaml.tmp"
    temporary.write_text(text)
    temporary.replace(folder / "config.yaml")
