"""What the report draws: one entry a panel, in the order of the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Lines:
    """Metrics drawn as lines; `metrics` are (name, label). Without data for any of them there is no panel."""

    key: str
    title: str
    unit: str
    metrics: tuple[tuple[str, str], ...]
    x: Literal["tokens", "minutes"] = "tokens"
    log: bool = False
    bottom: float | None = None
    """Where the y axis starts, if the height above it says something."""
    smooth: bool = True
    """Long curves are drawn as their running mean over the thin raw values."""
    markers: tuple[tuple[str, str], ...] = ()
    """Metrics drawn as points on top, for records that are rare."""


@dataclass(frozen=True)
class ByPosition:
    """Held-out loss by position bucket, first and last evaluation."""

    key: str
    title: str
    unit: str


@dataclass(frozen=True)
class StepTime:
    """Where a step's time goes, stacked: over tokens for one run, means side by side for several."""

    key: str
    title: str
    unit: str


@dataclass(frozen=True)
class ByLayer:
    """The last value of a family of metrics whose name ends with the layer."""

    key: str
    title: str
    unit: str
    prefix: str


Panel = Lines | ByPosition | StepTime | ByLayer

_HELD_OUT = (("eval/loss", "held-out"),)

PANELS: tuple[Panel, ...] = (
    ByPosition("held_out_by_position", "Held-out loss by position", "nats/token"),
    Lines("loss_tokens", "Loss over tokens", "nats/token", (("train/loss", "training"),), markers=_HELD_OUT),
    Lines(
        *("loss_time", "Loss over time", "nats/token", (("train/loss", "training"),)),
        x="minutes",
        markers=_HELD_OUT,
    ),
    Lines("grad_norm", "Gradient norm", "norm", (("train/grad_norm", "before clipping"),), log=True),
    Lines("lr", "Learning rate", "", (("train/lr", "learning rate"),), bottom=0, smooth=False),
    Lines(
        *("tokens_per_s", "Speed", "tokens/s", (("perf/tokens_per_s", "all devices"),)),
        bottom=0,
    ),
    Lines(
        *("tokens_per_s_per_gpu", "Speed of a device", "tokens/s"),
        (("perf/tokens_per_s_per_gpu", "a device"),),
        bottom=0,
    ),
    Lines("mfu", "Model FLOPs utilisation", "share of peak", (("perf/mfu", "dense causal"),), bottom=0),
    Lines(
        "tflops",
        "Arithmetic speed of a device",
        "TFLOP/s",
        (("perf/tflops_per_gpu", "dense causal"), ("perf/tflops_executed_per_gpu", "executed")),
        bottom=0,
    ),
    StepTime("step_time", "Step time by phase", "s"),
    Lines(
        "balance",
        "Balance over ranks",
        "busiest / mean",
        (
            ("balance/compute_max_over_mean", "time"),
            ("balance/tokens_max_over_mean", "tokens"),
            ("balance/work_max_over_mean", "attention work"),
        ),
        bottom=1,
    ),
    Lines(
        "comm_wait",
        "Waiting for the attention exchange",
        "share of a step",
        (("balance/comm_wait_frac", "waiting"),),
        bottom=0,
    ),
    Lines(
        "plan",
        "Planned over measured step time",
        "ratio",
        (("balance/lp_predicted_over_measured", "planned / measured"),),
    ),
    Lines(
        "memory",
        "Memory",
        "GiB",
        (
            ("mem/max_allocated_gib", "peak allocated"),
            ("mem/max_reserved_gib", "peak reserved"),
            ("mem/host_gib", "host"),
        ),
        bottom=0,
    ),
    Lines(
        "saved_bytes",
        "Saved for the backward",
        "B/(token layer)",
        (("mem/bytes_per_token_layer", "saved"),),
        bottom=0,
    ),
    Lines(
        "packing",
        "Packing",
        "share of the rows",
        (("data/pack_fill", "tokens"), ("data/pad_frac", "padding")),
        bottom=0,
    ),
    Lines(
        "documents",
        "Document lengths of a step",
        "tokens",
        (("data/doc_len_max", "longest"), ("data/doc_len_p50", "median")),
        log=True,
    ),
    Lines(
        "sparsity",
        "Attention sparsity",
        "share",
        (("sparse/density", "attended causal area"), ("sparse/selected_mass", "attention mass kept")),
        bottom=0,
    ),
    ByLayer("sparsity_by_layer", "Attended area by layer", "share", "sparse/density_by_layer/"),
    Lines(
        "elimination",
        "Token elimination",
        "share",
        (("elim/kept_frac", "tokens kept"), ("elim/captured_mass", "score mass kept")),
        bottom=0,
    ),
    ByLayer("elimination_by_layer", "Tokens kept by layer", "share", "elim/kept_frac_by_layer/"),
    Lines(
        "exchange",
        "Attention exchange a step",
        "B",
        (("comm/bytes_intra_node", "inside nodes"), ("comm/bytes_inter_node", "between nodes")),
        bottom=0,
    ),
    Lines(
        "sync_bytes",
        "Bytes of a synchronisation round",
        "B",
        (("sync/bytes_up", "sent"), ("sync/bytes_down", "received")),
        bottom=0,
    ),
    Lines("sync_compression", "Compression of sync", "dense / sent", (("sync/compression", "ratio"),)),
    Lines(
        "sync_time",
        "Time of a synchronisation round",
        "s",
        (("sync/round_time_s", "round"), ("sync/wait_s", "waiting for peers")),
        bottom=0,
    ),
    Lines(
        "sync_drift",
        "Drift between rounds",
        "relative",
        (("sync/drift", "local from outer parameters"),),
        bottom=0,
    ),
    Lines("gpu", "GPU utilisation", "%", (("gpu/utilization", "driver's figure"),), bottom=0),
    Lines("power", "GPU power", "W", (("gpu/power_w", "mean over devices"),), bottom=0),
)

# Phases of a step that follow one another, and those that run inside forward and backward.
PHASES: tuple[tuple[str, str], ...] = (
    ("time/data_s", "data"),
    ("time/plan_s", "plan"),
    ("time/forward_backward_s", "forward, backward"),
    ("time/grad_sync_s", "gradient sync"),
    ("time/optimizer_s", "optimizer"),
    ("time/sync_s", "outer sync"),
    ("time/checkpoint_s", "checkpoint"),
)
INSIDE_FORWARD_BACKWARD: tuple[tuple[str, str], ...] = (
    ("time/attention_s", "attention"),
    ("time/attention_comm_s", "attention exchange"),
)
