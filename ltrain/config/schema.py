"""`RunConfig`: every section of a run's YAML file, and the rules that join sections."""

from __future__ import annotations

from pydantic import model_validator

from ltrain.config.base import ConfigError, Section
from ltrain.config.data import DataConfig
from ltrain.config.elimination import BlockElimination, EliminationConfig, NoElimination
from ltrain.config.memory import MemorySection
from ltrain.config.model import ModelConfig
from ltrain.config.parallel import AttentionSection, ParallelSection
from ltrain.config.patterns import VerticalSlashFields
from ltrain.config.planner import MeasuredCost, PlannedAssignment
from ltrain.config.rope import KeepRope, RopeConfig
from ltrain.config.stage_links import check_stage_links
from ltrain.config.sync import EveryStep, SyncConfig
from ltrain.config.train import (
    AdamW,
    CheckpointSection,
    CosineSchedule,
    EvalSection,
    MetricsSection,
    OptimizerConfig,
    ProfileSection,
    RunSection,
    ScheduleConfig,
    TrainSection,
)

# Why token elimination can't be joined with these patterns.
LEARN_WHOLE = {
    "seer_gate": "its gate would learn the attention among kept tokens, and evaluation drops none",
    "nsa": "its window and compressed branches go by distance in the whole sequence, not among kept tokens",
}


class RunConfig(Section):
    """One run. Only `model` and `data` have no default."""

    run: RunSection = RunSection()
    """Name, place and seed."""
    model: ModelConfig
    """The model to train."""
    rope: RopeConfig = KeepRope()
    """How the rotary embedding is changed for the longer context."""
    data: DataConfig
    """What to train on."""
    train: TrainSection = TrainSection()
    """How long and at what context."""
    optimizer: OptimizerConfig = AdamW()
    """The optimizer."""
    schedule: ScheduleConfig = CosineSchedule()
    """The learning rate over the steps."""
    parallel: ParallelSection = ParallelSection()
    """How the work is laid over devices."""
    attention: AttentionSection = AttentionSection()
    """What attention computes."""
    memory: MemorySection = MemorySection()
    """What is saved for the backward pass."""
    elimination: EliminationConfig = NoElimination()
    """Which tokens a layer processes."""
    sync: SyncConfig = EveryStep()
    """How replicas of the run, each a job of its own, stay together."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving and resuming."""
    metrics: MetricsSection = MetricsSection()
    """Where measurements go."""
    eval: EvalSection = EvalSection()
    """Held-out evaluation while training."""
    profile: ProfileSection = ProfileSection()
    """Traces and memory snapshots."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        check_sections(self)
        return self


def check_sections(config: RunConfig) -> None:
    """Raise ConfigError where sections contradict one another, whatever the world size."""
    train, parallel = config.train, config.parallel
    if train.tokens_per_step % train.seq_len:
        lower = max(1, train.tokens_per_step // train.seq_len) * train.seq_len
        raise ConfigError(
            "train.tokens_per_step",
            train.tokens_per_step,
            f"must be a multiple of train.seq_len={train.seq_len}",
            f"use {lower} or {lower + train.seq_len}",
        )
    if parallel.tensor > 1 and parallel.sequence_parallel:
        for name, value in (
            ("train.seq_len", train.seq_len),
            ("parallel.context.block", parallel.context.block),
        ):
            if value % parallel.tensor:
                raise ConfigError(
                    name,
                    value,
                    f"must be a multiple of parallel.tensor={parallel.tensor} with sequence parallelism",
                    f"use {value // parallel.tensor * parallel.tensor or parallel.tensor}",
                )
    if config.schedule.warmup_steps > train.steps:
        raise ConfigError(
            "schedule.warmup_steps",
            config.schedule.warmup_steps,
            f"must not exceed train.steps={train.steps}",
        )
    if isinstance(config.elimination, BlockElimination):
        kind = config.attention.pattern.kind
        if kind in LEARN_WHOLE:
            rule = f"can't be joined with token elimination: {LEARN_WHOLE[kind]}"
            fix = "take another pattern, for example block_topk, or elimination.kind=none"
            raise ConfigError("attention.pattern.kind", kind, rule, fix)
        check_elimination(config, config.elimination)
    if config.sync.kind == "every_step" and config.sync.peers is not None:
        raise ConfigError(
            "sync.kind",
            "every_step",
            "cannot be joined by peers in the trainer",
            "launch one job over all ranks, or take diloco or sparse_loco",
        )
    check_stage_links(
        parallel.stage_links,
        pipeline=parallel.pipeline,
        tensor=parallel.tensor,
        lora=config.model.adapter.kind == "lora",
        frozen=bool(config.model.freeze),
        delayed=config.sync.kind != "every_step" and config.sync.overlap == "delayed",
    )
    if isinstance(parallel.assignment, PlannedAssignment):
        check_planned(parallel, parallel.assignment)
    steps = config.profile.steps
    if steps is not None and not steps[0] <= steps[1] <= train.steps:
        raise ConfigError(
            "profile.steps",
            list(steps),
            f"must be first and last step, in order, up to train.steps={train.steps}",
        )
    node_size = parallel.context.node_size
    if node_size is not None and parallel.context.degree % node_size:
        raise ConfigError(
            "parallel.context.node_size",
            node_size,
            f"must divide parallel.context.degree={parallel.context.degree}",
        )


def check_planned(parallel: ParallelSection, section: PlannedAssignment) -> None:
    """Raise ConfigError where fields contradict a planned assignment."""
    context = parallel.context
    rules: tuple[tuple[bool, str, object, str, str], ...] = (
        (
            context.schedule == "auto",
            "parallel.context.schedule",
            context.schedule,
            "must be auto where parallel.assignment.kind=planned: each group has its own exchange",
            "set parallel.assignment.schedules",
        ),
        (
            context.layout in ("auto", "striped"),
            "parallel.context.layout",
            context.layout,
            "must be auto or striped where parallel.assignment.kind=planned: shares are counted in blocks",
            "leave it out",
        ),
        (
            context.node_size is None,
            "parallel.context.node_size",
            context.node_size,
            "must be absent where parallel.assignment.kind=planned: nodes are those of the cluster",
            "set parallel.assignment.cluster",
        ),
        (
            parallel.pipeline == 1 or not isinstance(section.cost, MeasuredCost),
            "parallel.assignment.cost.kind",
            "measured",
            f"needs parallel.pipeline=1, not {parallel.pipeline}: micro-batches overlap in a pipeline",
            "give the constants: kind given",
        ),
        (
            parallel.pipeline == 1 or section.calibrate == "off",
            "parallel.assignment.calibrate",
            "online",
            f"needs parallel.pipeline=1, not {parallel.pipeline}: micro-batches overlap in a pipeline",
            "set it to off",
        ),
    )
    for holds, field, value, rule, fix in rules:
        if not holds:
            raise ConfigError(field, value, rule, fix)


def check_elimination(config: RunConfig, elimination: BlockElimination) -> None:
    """Raise ConfigError where token elimination can't be combined with the rest of the run."""
    parallel = config.parallel
    context, tensor = parallel.context, parallel.tensor
    if context.layout == "dealt":
        raise ConfigError(
            "parallel.context.layout",
            context.layout,
            "has no strata of equal shares, which token elimination needs",
            "leave it out: blocks are striped",
        )
    block = elimination.block or context.block
    if context.block % block:
        raise ConfigError(
            "elimination.block",
            block,
            f"must divide parallel.context.block={context.block}",
            "blocks stay whole",
        )
    need = 2 * tensor * context.degree
    if elimination.strata % need:
        raise ConfigError(
            "elimination.strata",
            elimination.strata,
            f"must be a multiple of 2 x parallel.tensor x parallel.context.degree = {need}",
            f"use {-(-elimination.strata // need) * need}",
        )
    blocks = -(-config.train.seq_len // context.block)
    if elimination.strata > blocks:
        raise ConfigError(
            "elimination.strata",
            elimination.strata,
            f"must not exceed the {blocks} blocks of parallel.context.block in train.seq_len",
            "use smaller blocks or fewer strata",
        )
    pattern = config.attention.pattern
    if isinstance(pattern, VerticalSlashFields) and pattern.verticals != "blocks":
        raise ConfigError(
            "attention.pattern.verticals",
            pattern.verticals,
            "can't be combined with elimination, which keeps whole blocks",
            "use blocks",
        )
    if pattern.kind != "dense" and block != context.block:
        raise ConfigError(
            "elimination.block", block, f"must be parallel.context.block={context.block} with sparse patterns"
        )
    scorer = elimination.scorer.kind
    if scorer == "lemo" and (context.degree > 1 or tensor > 1):
        raise ConfigError(
            "elimination.scorer.kind",
            scorer,
            "compares all tokens and heads, which must lie on one rank",
            "take pooled or predictor, or context and tensor degrees of 1",
        )
    if scorer == "predictor" and tensor > 1 and parallel.sequence_parallel:
        raise ConfigError(
            "elimination.scorer.kind",
            scorer,
            "reads whole blocks, which sequence parallelism cuts",
            "set parallel.sequence_parallel to false, or take pooled",
        )
