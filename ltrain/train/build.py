"""Building a run: mesh, data, model, optimizer, checkpoints."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from ltrain.attention import patterns
from ltrain.attention.module import AttentionSettings, CoreAttention
from ltrain.config.model import LoraAdapter
from ltrain.config.planner import PlannedAssignment
from ltrain.config.schema import RunConfig
from ltrain.data.loader import Loader, held_out_rows, open_corpus
from ltrain.elimination.runtime import Elimination
from ltrain.model.build import build_model
from ltrain.model.freeze import freeze_parameters
from ltrain.model.language_model import LanguageModel
from ltrain.model.lora import init_adapter
from ltrain.model.spec import ModelSpec
from ltrain.model.weights import import_model
from ltrain.parallel import seam
from ltrain.parallel.mesh import Mesh, init_mesh
from ltrain.train.assignment import Assignment, StaticAssignment
from ltrain.train.batch import MicroBatch
from ltrain.train.checkpoint.manager import CheckpointManager
from ltrain.train.elimination import build_elimination
from ltrain.train.evaluate import position_buckets
from ltrain.train.optimizer import build_optimizer
from ltrain.train.plan import check_run, longest_part, run_folder
from ltrain.train.planned import Planned
from ltrain.train.replicas import Replicas
from ltrain.train.run import Run
from ltrain.train.stage_links import StageLinks
from ltrain.train.step import run_model, wrap_ddp

log = logging.getLogger("ltrain")


def build_run(config: RunConfig) -> Run:
    """Build all parts of a run on this rank, at step 0. Collective over the default group."""
    parallel, train = config.parallel, config.train
    plan = check_run(config, dist.get_world_size())
    mesh = init_mesh(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        context=parallel.context.degree,
        timeout_s=train.timeout_s,
    )
    with seam.cpu_seam():
        model_parallel_cuda_manual_seed(config.run.seed, force_reset_rng=True)
    # One process tokenises what is not in the cache yet, under a lock; the others wait for it.
    corpus = open_corpus(config.data, plan.tokenizer)
    elimination = build_elimination(config, plan.spec)
    model = build_language_model(config, plan.spec, mesh, elimination)
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
    optimizer = build_optimizer(config.optimizer, [ddp], bf16=train.dtype == "bf16")
    links = StageLinks(config, plan.spec, model, optimizer, mesh)
    # The outer state starts from whole parameters; what links ask for comes after it.
    replicas = Replicas(config, plan.spec, model, ddp, optimizer, mesh, links)
    replicas.start_local()
    planned = parallel.assignment if isinstance(parallel.assignment, PlannedAssignment) else None
    loader = Loader(
        config.data,
        corpus,
        seq_len=train.seq_len,
        tokens_per_step=train.tokens_per_step,
        seed=config.run.seed,
        prefetch=planned.ahead if planned else 1,
    )
    assignment: Assignment = StaticAssignment(parallel.context, mesh)
    if planned is not None:

        def probe(batches: list[MicroBatch]) -> None:
            ddp.zero_grad_buffer()
            run_model(ddp, mesh, batches, train=True, times=assignment.times)
            ddp.zero_grad_buffer()

        assignment = Planned(
            config,
            planned,
            plan.spec,
            mesh,
            upcoming=lambda: [step.rows for step in loader.upcoming()],
            longest=longest_part(config, corpus),
            run=probe,
            folder=run_folder(config),
        )
    return Run(
        config=config,
        folder=run_folder(config),
        mesh=mesh,
        spec=plan.spec,
        model=model,
        ddp=ddp,
        optimizer=optimizer,
        loader=loader,
        held_out=held_out,
        buckets=position_buckets(train.seq_len, config.eval.buckets),
        assignment=assignment,
        checkpoints=CheckpointManager(
            run_folder(config) / "checkpoints",
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            timeout_s=train.timeout_s,
        ),
        tokenizer=plan.tokenizer,
        source_rope=plan.source_rope,
        links=links,
        replicas=replicas,
        elimination=elimination,
    )


def build_language_model(
    config: RunConfig, spec: ModelSpec, mesh: Mesh, elimination: Elimination | None = None
) -> Any:
    """This rank's stage and shard of the model, with the weights of its source."""
    settings = AttentionSettings(
        rope=spec.rope,
        windows=spec.windows,
        pattern=patterns.from_config(config.attention.pattern),
        total_kv_heads=spec.num_kv_heads,
        schedule=config.parallel.context.schedule,
        tensor_rank=mesh.tensor.rank,
    )
    lora = config.model.adapter if isinstance(config.model.adapter, LoraAdapter) else None
    model = build_model(
        spec,
        lora=lora,
        memory_level=config.memory.level,
        elimination=elimination,
        core_attention=partial(CoreAttention, settings=settings),
        model_class=LanguageModel,
        real_vocab_size=spec.vocab_size,
        tensor=mesh.tensor.size,
        pipeline=mesh.pipeline.size,
        context=mesh.context.size,
        sequence_parallel=config.parallel.sequence_parallel,
        dtype=torch.bfloat16 if config.train.dtype == "bf16" else torch.float32,
        pre_process=mesh.is_first_stage,
        post_process=mesh.is_last_stage,
        variable_seq_lengths=mesh.pipeline.size > 1,
        loss_chunk_tokens=config.train.loss_chunk_tokens,
        z_loss=config.train.z_loss,
    )
    model.to(mesh.device)
    import_model(model, spec, mesh, seed=config.run.seed)
    if lora is not None:
        init_adapter(model, spec, lora, mesh, seed=config.run.seed)
    freeze_parameters(model, spec, config.model, mesh)
    return model
