"""What crosses the boundaries of pipeline stages: `parallel.stage_links`, a union by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from ltrain.config.base import ConfigError, Section

Adaptation = Literal["project_writers", "absorb_embedding_drift"]


class IdentityLinks(Section):
    """Activations cross as they are."""

    kind: Literal["identity"] = "identity"


class _Compressed(Section):
    rank: PositiveInt
    """Numbers a token that cross a compressed boundary each way, in place of hidden_size."""
    seed: NonNegativeInt = 0
    """Seed of the subspace; all replicas of a run must use the same."""
    slow: tuple[NonNegativeInt, ...] | None = None
    """The boundaries that are compressed: i is the one behind stage i. All of them where absent."""


class ProjectionLinks(_Compressed):
    """The stream's part in a subspace crosses (arXiv 2601.02360); layers and parameters are those of any
    model.

    A replica without slow links takes `identity`.
    """

    kind: Literal["projection"] = "projection"
    adaptations: tuple[Adaptation, ...] = ("project_writers", "absorb_embedding_drift")
    """What keeps the link exact. `project_writers`: residual writers before a slow boundary, and the learned
    part of the embedding, are projected into the subspace after every step and outer round, on this replica
    only. `absorb_embedding_drift`: what an outer round moved out of the subspace in the embedding becomes
    part of the table that both ends of a link know."""


class ReparametrisedLinks(_Compressed):
    """Residual writers are U A with a trained A, so that they can write into the subspace only and the link
    is exact under any optimizer. The model has other parameters: all replicas must use this kind.
    """

    kind: Literal["reparametrised"] = "reparametrised"
    free_layers: NonNegativeInt = 0
    """Layers at the end of the model that stay as they are; no compressed boundary may stand behind one."""


StageLinksConfig = Annotated[
    IdentityLinks | ProjectionLinks | ReparametrisedLinks, Field(discriminator="kind")
]


def slow_boundaries(links: IdentityLinks | ProjectionLinks | ReparametrisedLinks, pipeline: int) -> set[int]:
    """The boundaries that are compressed in a pipeline of so many stages. Raises ConfigError."""
    if isinstance(links, IdentityLinks):
        return set()
    if links.slow is None:
        return set(range(pipeline - 1))
    for boundary in links.slow:
        if boundary >= pipeline - 1:
            raise ConfigError(
                "parallel.stage_links.slow",
                boundary,
                f"must be below {pipeline - 1}: parallel.pipeline={pipeline} has so many boundaries",
            )
    return set(links.slow)


def check_stage_links(
    links: IdentityLinks | ProjectionLinks | ReparametrisedLinks,
    *,
    pipeline: int,
    tensor: int,
    lora: bool,
    frozen: bool,
    delayed: bool,
) -> None:
    """Refuse what the links cannot be combined with. Raises ConfigError."""
    slow = slow_boundaries(links, pipeline)
    if isinstance(links, IdentityLinks):
        return
    field = "parallel.stage_links.kind"
    if tensor > 1:
        raise ConfigError(field, links.kind, f"cannot be joined with parallel.tensor={tensor}", "use 1")
    if lora:
        rule = "cannot be joined with model.adapter.kind=lora: an adapter writes outside of the subspace"
        raise ConfigError(field, links.kind, rule, "train the weights, or use identity")
    if isinstance(links, ReparametrisedLinks):
        return
    if not slow:
        rule = f"compresses no boundary of parallel.pipeline={pipeline}"
        raise ConfigError(field, links.kind, rule, "leave stage_links out in a replica without slow links")
    if frozen:
        rule = "cannot be joined with model.freeze: writers before a slow boundary are projected"
        raise ConfigError(field, links.kind, rule, "train all weights, or use identity")
    if delayed:
        rule = "cannot be joined with sync.overlap=delayed: local progress must start from theta"
        raise ConfigError(field, links.kind, rule, "use sync.overlap=none")
