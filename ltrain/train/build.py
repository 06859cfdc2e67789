"""Building a run: what can be checked without a process group first, then mesh, model, data, optimizer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ltrain.attention.module import AttentionSettings, CoreAttention
from ltrain.config.base import ConfigError
from ltrain.config.model import HFModel
from ltrain.config.schema import RunConfig
from ltrain.data.loader import Corpus, Loader, held_out_rows, open_corpus
from ltrain.data.tokenizer import Tokenizer, load_tokenizer
from ltrain.model.build import build_model
from ltrain.model.families import extend_rope, resolve_spec
from ltrain.model.language_model import LanguageModel
from ltrain.model.spec import ModelSpec
from ltrain.parallel.mesh import Mesh, check_world, init_mesh
from ltrain.train.assignment import StaticAssignment, rows_per_step
from ltrain.train.checkpoint.manager import CheckpointManager
from ltrain.train.evaluate import position_buckets
from ltrain.train.optimizer import build_optimizer
from ltrain.train.run import Run
from ltrain.train.step import wrap_ddp

log = logging.getLogger("ltrain")


@dataclass(frozen=True)
class Plan:
    """What a configuration means before anything is started: the model, its degrees, the shape of a step."""

    spec: ModelSpec
    tokenizer: Tokenizer
    data_size: int
    rows: int


def run_folder(config: RunConfig) -> Path:
    return config.run.output / config.run.name


def check_run(config: RunConfig, world_size: int) -> Plan:
    """Check everything that needs no process group. Raises ConfigError."""
    parallel = config.parallel
    data_size = check_world(
        world_size, tensor=parallel.tensor, pipeline=parallel.pipeline, context=parallel.context.degree
    )
    tokenizer = load_tokenizer(config.data.tokenizer)
    spec = resolve_spec(config.model, tokenizer_vocab_size=tokenizer.vocab_size)
    spec = extend_rope(spec, config.rope, config.train.seq_len)
    spec.check_parallel(tensor=parallel.tensor, pipeline=parallel.pipeline)
    if isinstance(config.model, HFModel):
        from ltrain.model.weights import check_weights

        check_weights(spec)
    rows = rows_per_step(config.train.tokens_per_step, config.train.seq_len, data_size)
    return Plan(spec, tokenizer, data_size, rows)


def build_run(config: RunConfig, *, world_size: int | None = None) -> Run:
    """Build all parts of a run on this rank, at step 0. Collective over the default group."""
    parallel, train = config.parallel, config.train
    plan = check_run(config, dist.get_world_size())
    mesh = init_mesh(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context.degree,
        timeout_s=train.timeout_s,
    )
    corpus = open_corpus_once(config, plan.tokenizer)
    model = build_language_model(config, plan.spec, mesh)
    ddp = wrap_ddp(
        model, distributed_optimizer=config.optimizer.distributed, overlap=parallel.overlap_grad_reduce
    )
    held_out = held_out_rows(
        config.data,
        corpus,
        seq_len=train.seq_len,
        max_tokens=config.eval.max_tokens,
        min_tokens=config.eval.min_document_tokens,
    )
    return Run(
        config=config,
        folder=run_folder(config),
        mesh=mesh,
        spec=plan.spec,
        model=model,
        ddp=ddp,
        optimizer=build_optimizer(config.optimizer, [ddp], bf16=train.dtype == "bf16"),
        loader=Loader(
            config.data,
            corpus,
            seq_len=train.seq_len,
            tokens_per_step=train.tokens_per_step,
            seed=config.run.seed,
        ),
        held_out=held_out,
        buckets=position_buckets(train.seq_len, config.eval.buckets),
        assignment=StaticAssignment(parallel.context, mesh),
        checkpoints=CheckpointManager(
            run_folder(config) / "checkpoints",
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            timeout_s=train.timeout_s,
        ),
        tokenizer=plan.tokenizer,
    )


def open_corpus_once(config: RunConfig, tokenizer: Tokenizer) -> Corpus:
    """Open the data on all ranks, the first of which tokenises what is not in the cache yet."""
    outcome: list[Any] = [None]
    corpus = None
    if dist.get_rank() == 0:
        try:
            corpus = open_corpus(config.data, tokenizer)
        except ConfigError as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise outcome[0]
    return corpus or open_corpus(config.data, tokenizer)


def build_language_model(config: RunConfig, spec: ModelSpec, mesh: Mesh) -> Any:
    """This rank's stage and shard of the model, with the weights of its source."""
    settings = AttentionSettings(
        rope=spec.rope,
        windows=spec.windows,
        schedule=config.parallel.context.schedule,
        tensor_rank=mesh.tensor.rank,
    )
    model = build_model(
        spec,
        core_attention=partial(CoreAttention, settings=settings),
        tensor=mesh.tensor.size,
        pipeline=mesh.pipeline.size,
        context=mesh.context.size,
        sequence_parallel=config.parallel.sequence_parallel,
        dtype=torch.bfloat16 if config.train.dtype == "bf16" else torch.float32,
        pre_process=mesh.is_first_stage,
        post_process=mesh.is_last_stage,
        variable_seq_lengths=mesh.pipeline.size > 1,
        model_class=LanguageModel,
        real_vocab_size=spec.vocab_size,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        z_loss=config.train.z_loss,
    )
    model.to(mesh.device)
    if isinstance(config.model, HFModel):
        from ltrain.model.weights import import_model

        import_model(model, spec, mesh)
    return model
