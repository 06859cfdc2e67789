"""How replicas of a run stay together: every step, or in rounds of local steps over slow links."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field

from ltrain.config.base import ConfigError, Section

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


class Peers(Section):
    """Where the replicas meet, and how long they wait for each other."""

    rendezvous: str
    """`host:port` of the rendezvous service (`ltrain sync-rendezvous`)."""

    token_file: str
    """File with the secret that every process of the run shares: at least 16 bytes, readable by its owner
    only."""

    replica: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    """Name of this replica; unique in the run, kept over restarts."""

    num_replicas: Annotated[int, Field(ge=1)] = 2
    """The first round starts when so many replicas are there; more may join later."""

    stages: Annotated[int, Field(ge=1)] = 1
    """Pipeline stages of the run's most finely cut replica; the same in all. Each stage is exchanged apart,
    so that a replica in one process meets one that is a pipeline."""

    host: str | None = None
    """Address at which the other replicas reach this process; where absent, that of the interface which leads
    to the rendezvous service."""

    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """First port to listen at, rank r taking port + r; 0 takes any free one."""

    min_wait_s: Positive = 2.0
    """A round waits at least so long for stragglers after the first replica is ready."""

    max_wait_s: Positive = 600.0
    """And never longer than this; between the two it waits for the usual lateness of recent rounds."""

    lateness_factor: Annotated[float, Field(ge=0.0)] = 4.0
    """Deadline = median + factor x median absolute deviation of the lateness of recent rounds."""

    connect_timeout_s: Positive = 60.0
    """How long to try to reach the rendezvous service, at the start and after it was lost."""

    verify_every: Annotated[int, Field(ge=0)] = 1
    """Compare a digest of all parameters between replicas every so many rounds; 0 never."""


class EveryStep(Section):
    """Gradients are averaged over the replicas in every step: plain data parallelism."""

    kind: Literal["every_step"] = "every_step"

    bits: Literal[16, 32] = 32
    """Bits of a gradient entry between replicas: bfloat16 or float32."""

    peers: Peers | None = None
    """The other replicas; none when this job is the whole run."""


class _Rounds(Section):
    """What the methods with local steps share."""

    steps_per_round: Annotated[int, Field(ge=1, le=10_000)] = 30
    """Inner steps between two exchanges (H)."""

    gain: Positive | None = None
    """Total effect of one unit of pseudo-gradient on the parameters over time; when set it replaces the fixed
    outer rate by the rate that gives this gain, whatever the replicas, density and aggregation."""

    overlap: Literal["none", "delayed"] = "none"
    """`delayed` sends while the next inner steps run and applies the update one round late, each replica
    keeping its own progress meanwhile."""

    peers: Peers | None = None
    """The other replicas."""


class DiLoCo(_Rounds):
    """Local steps, then dense averaging of pseudo-gradients and an outer Nesterov step (arXiv 2311.08105)."""

    kind: Literal["diloco"] = "diloco"

    outer_lr: Positive = 0.7
    """Outer learning rate."""

    outer_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Outer momentum; 0 is plain averaging."""

    nesterov: bool = True
    """Nesterov's form of the outer momentum."""

    bits: Literal[16, 32] = 32
    """Bits of a pseudo-gradient entry on the wire: bfloat16 or float32."""


class SparseLoCo(_Rounds):
    """Local steps, then an exchange of sparse, quantised, error-fed pseudo-gradients (arXiv 2508.15706)."""

    kind: Literal["sparse_loco"] = "sparse_loco"

    density: Share = 64 / 4096
    """Share of the entries of a chunk that travel."""

    bits: Literal[1, 2, 16, 32] = 2
    """Bits of a value: 2 the published table, 1 a sign with a scale a chunk, 16 bfloat16, 32 float32."""

    chunk: Annotated[int, Field(ge=16, le=65536)] = 4096
    """Entries of a chunk, among which the largest are chosen."""

    blocks: Literal["square", "runs"] = "square"
    """Chunks of a matrix: sqrt(chunk) x sqrt(chunk) blocks where the sides allow, or runs of the flattened
    tensor."""

    error_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.95
    """Factor on the unsent remainder before the next pseudo-gradient is added; 0 is no error feedback."""

    aggregation: Literal["mean", "senders"] = "mean"
    """Divide the sum at a coordinate by all replicas (published), or by those that sent it (public code)."""

    outer_lr: Positive = 1.0
    """Outer learning rate; replaced when `gain` is set."""

    max_outer_lr: Positive = 4.0
    """Bound of the rate that `gain` asks for."""

    clip_to_median: bool = False
    """Scale each replica's contribution to a tensor down to the median norm over replicas."""

    restore_missed: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of a contribution that returns to the error buffer when it missed its round."""

    adapt: bool = False
    """Choose local steps, and density and bits per replica, from measured links."""

    target_round_s: Positive | None = None
    """With `adapt`: a round, compute and exchange, should take no longer than this."""

    min_density: Share = 16 / 4096
    """With `adapt`: the smallest density that may be chosen."""

    max_steps_per_round: Annotated[int, Field(ge=1, le=10_000)] = 240
    """With `adapt`: the largest number of local steps that may be chosen."""


SyncConfig = Annotated[EveryStep | DiLoCo | SparseLoCo, Field(discriminator="kind")]


def check_sync(config: EveryStep | DiLoCo | SparseLoCo) -> None:
    """Refuse what single fields cannot see. Raises ConfigError."""
    peers = config.peers
    if not isinstance(config, EveryStep) and peers is None:
        raise ConfigError("sync.peers", None, f"must be given for kind {config.kind}", "say where they meet")
    if peers is not None:
        parse_address("sync.peers.rendezvous", peers.rendezvous)
        if peers.min_wait_s > peers.max_wait_s:
            raise ConfigError(
                "sync.peers.min_wait_s", peers.min_wait_s, f"must be at most max_wait_s={peers.max_wait_s}"
            )
    if isinstance(config, SparseLoCo):
        _check_sparse(config)


def _check_sparse(config: SparseLoCo) -> None:
    if config.adapt and config.target_round_s is None:
        raise ConfigError(
            "sync.target_round_s", None, "must be given with adapt", "say how long a round may take"
        )
    if config.target_round_s is not None and not config.adapt:
        raise ConfigError("sync.target_round_s", config.target_round_s, "has an effect only with adapt: true")
    if config.adapt and config.min_density > config.density:
        raise ConfigError("sync.min_density", config.min_density, f"must be at most density={config.density}")
    if config.adapt and config.max_steps_per_round < config.steps_per_round:
        raise ConfigError(
            "sync.max_steps_per_round",
            config.max_steps_per_round,
            f"must be at least steps_per_round={config.steps_per_round}",
        )
    if config.density * config.chunk < 1.0:
        raise ConfigError(
            "sync.density",
            config.density,
            f"must keep one of {config.chunk} entries",
            f"use {1 / config.chunk}",
        )
    if config.density == 1.0 and config.bits in (1, 2) and config.error_decay == 0.0:
        raise ConfigError("sync.error_decay", 0.0, "must be above 0 where all entries are quantised")


def parse_address(field: str, address: str) -> tuple[str, int]:
    """(host, port) of `host:port`. Raises ConfigError."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})", address)
    if not match or not 0 < int(match[2]) < 65536:
        raise ConfigError(field, address, "must be host:port", "for example 10.0.0.1:29400")
    return match[1].strip("[]"), int(match[2])
