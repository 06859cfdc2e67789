"""What to train for how long: `run`, `train`, `optimizer`, `schedule`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from ltrain.config.base import Section


class RunSection(Section):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run; its files go to `output/name`."""
    output: Path = Path("outputs")
    """Folder that holds the runs."""
    stop_marker: Path | None = None
    """File to leave behind, with the step, when the run stops on request: launchers requeue by it."""
    seed: NonNegativeInt = 1
    """Seed of the weights that are new, of the data order and of every random choice."""


class TrainSection(Section):
    seq_len: PositiveInt = 4096
    """Tokens in one packed row: the context that the model is trained at."""
    tokens_per_step: PositiveInt = 32768
    """Tokens in one optimizer step over all ranks. Rows a step and gradient accumulation follow from it."""
    steps: NonNegativeInt = 100
    """Number of optimizer steps."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Type of parameters and activations. With bf16 the optimizer keeps fp32 main copies; gradients are
    reduced in fp32 either way."""
    loss_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits exist at one time in the loss."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log-partition term that keeps logits small (0: off)."""
    max_minutes: PositiveFloat | None = None
    """Stop, save and exit with code 75 after this many minutes."""
    nonfinite_limit: PositiveInt = 10
    """Stop after this many steps in a row whose gradient was not finite; each of them is skipped and counted.
    """
    rollback_factor: PositiveFloat | None = None
    """Go back to the last checkpoint, and skip the batches since, when the loss exceeds this factor times its
    running median over 50 steps. Off by default."""
    rollback_limit: PositiveInt = 3
    """Number of rollbacks after which the run stops."""
    timeout_s: PositiveFloat = 600.0
    """Time after which a collective operation that does not end is an error that names rank and phase."""
    deterministic: bool = True
    """Use deterministic operations only, so that a resumed run equals an unbroken one bit for bit."""


class AdamW(Section):
    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 2e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; norms and biases are never decayed."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this (0: no clipping)."""
    distributed: bool = True
    """Shard the optimizer state over the ranks that hold the same parameters (mcore's distributed optimizer).
    """


class CPUAdam(AdamW):
    kind: Literal["cpu_adam"] = "cpu_adam"  # type: ignore[assignment]


OptimizerConfig = Annotated[AdamW | CPUAdam, Field(discriminator="kind")]


class _Warmup(Section):
    warmup_steps: NonNegativeInt = 0
    """Steps over which the learning rate rises linearly from 0."""


class ConstantSchedule(_Warmup):
    kind: Literal["constant"] = "constant"


class _Decay(_Warmup):
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Final learning rate as a fraction of the peak."""


class CosineSchedule(_Decay):
    kind: Literal["cosine"] = "cosine"


class LinearSchedule(_Decay):
    kind: Literal["linear"] = "linear"


class WSDSchedule(_Decay):
    kind: Literal["wsd"] = "wsd"
    decay_steps: PositiveInt = 10
    """Steps of the final decay; between warm-up and decay the rate is constant."""


ScheduleConfig = Annotated[
    ConstantSchedule | CosineSchedule | LinearSchedule | WSDSchedule, Field(discriminator="kind")
]


class CheckpointSection(Section):
    every: NonNegativeInt = 100
    """Steps between checkpoints (0: only at the end and when stopped)."""
    keep: PositiveInt = 2
    """Number of whole checkpoints to keep; older ones are removed after a newer one is whole."""
    asynchronous: bool = True
    """Write in the background while training goes on."""
    resume: bool = True
    """Continue from the newest whole checkpoint of this run, if there is one."""
    init_from: Path | None = None
    """A checkpoint of another run to take the parameters from; schedule, data and optimizer start fresh."""
    on_full_disk: Literal["continue", "stop"] = "continue"
    """What to do when a checkpoint cannot be written: go on and warn, or stop with code 4. Older checkpoints
    stay.
    """
    export: bool = True
    """Write the final model as a Hugging Face folder, `output/name/hf`."""


class MetricsSection(Section):
    every: PositiveInt = 1
    """Steps between logged lines."""
    wandb: Literal["off", "offline", "online", "auto"] = "off"
    """Weights & Biases. `auto` is online with a key in the environment or netrc and offline without."""
    wandb_project: str = "ltrain"
    """Project of the run at Weights & Biases."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run at Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard events to `output/name/tensorboard`."""
    console: Literal["auto", "live", "plain", "quiet"] = "auto"
    """Terminal output: a live panel on a terminal and plain lines otherwise (`auto`), or one of them always.
    """
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in TFLOP/s for MFU where the device is not known; without it no MFU is reported."""


class EvalSection(Section):
    every: NonNegativeInt = 0
    """Steps between evaluations of the held-out documents (0: only before and after training)."""
    at_start: bool = True
    """Evaluate before the first step."""
    at_end: bool = True
    """Evaluate after the last step."""
    max_tokens: NonNegativeInt = 65536
    """Held-out tokens of one evaluation (0: never evaluate)."""
    min_document_tokens: NonNegativeInt = 0
    """Use only held-out documents of at least this many tokens, so that far positions are filled."""
    buckets: tuple[PositiveInt, ...] = ()
    """Upper ends of the position buckets; powers of two up to the context where empty."""


class ProfileSection(Section):
    steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step to profile."""
    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks that profile."""
    kinds: tuple[Literal["trace", "memory"], ...] = ("trace",)
    """`trace`: a Chrome trace. `memory`: the allocator's history on CUDA, bytes by operation on the CPU."""
