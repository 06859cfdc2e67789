"""Which parameters are trained: `model.freeze` and `model.adapter`, by Hugging Face tensor names."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from ltrain.config.base import ConfigError
from ltrain.config.model import HFModel, LoraAdapter, NewModel
from ltrain.model.sharding import hf_shapes, stage_shards
from ltrain.model.spec import ModelSpec

if TYPE_CHECKING:
    from ltrain.parallel.mesh import Mesh


def frozen_tensors(spec: ModelSpec, config: HFModel | NewModel) -> set[str]:
    """The Hugging Face tensors that are not trained. Raises ConfigError on patterns that match nothing or cut
    through a fused parameter, and where nothing is left to train."""
    names = list(hf_shapes(spec))
    lora = isinstance(config.adapter, LoraAdapter)
    frozen = set(_matching("model.freeze", config.freeze, names))
    if isinstance(config.adapter, LoraAdapter):
        trained = set(_matching("model.adapter.also_train", config.adapter.also_train, names))
        frozen = (set(names) - trained) | frozen
    for name, shard in stage_shards(spec, stage=0, stages=1, tensor_rank=0, tensor_size=1).items():
        parts = {piece.name for piece in shard.pieces}
        if parts & frozen and parts - frozen:
            rule = f"freezes a part of {name}, which is one parameter in training"
            fix = f"name {', '.join(sorted(parts - frozen))} too, or none of them"
            field = "model.adapter.also_train" if lora else "model.freeze"
            raise ConfigError(field, sorted(parts & frozen), rule, fix)
    if not lora and len(frozen) == len(names):
        raise ConfigError("model.freeze", config.freeze, "leaves nothing to train")
    return frozen


def count_trained(spec: ModelSpec, config: HFModel | NewModel) -> int:
    """Number of trained parameters of the whole model, adapters included."""
    frozen = frozen_tensors(spec, config)
    shapes = [shape for name, shape in hf_shapes(spec).items() if name not in frozen]
    if isinstance(config.adapter, LoraAdapter):
        # Here and not above, so that checking a configuration without adapters doesn't import mcore.
        from ltrain.model.lora import adapter_shards

        shards = adapter_shards(spec, config.adapter, stage=0, stages=1, tensor_rank=0, tensor_size=1)
        shapes += [shard.shape for shard in shards.values()]
    return sum(math.prod(shape) for shape in shapes)


def freeze_parameters(model: nn.Module, spec: ModelSpec, config: HFModel | NewModel, mesh: Mesh) -> None:
    """Stop gradients of this rank's parameters as `model.freeze` and `model.adapter` say. Call before DDP."""
    frozen = frozen_tensors(spec, config)
    shards = stage_shards(
        spec,
        stage=mesh.pipeline.rank,
        stages=mesh.pipeline.size,
        tensor_rank=mesh.tensor.rank,
        tensor_size=mesh.tensor.size,
    )
    for name, parameter in model.named_parameters():
        if name in shards and any(piece.name in frozen for piece in shards[name].pieces):
            parameter.requires_grad_(False)


def _matching(field: str, patterns: Iterable[str], names: list[str]) -> list[str]:
    matched: list[str] = []
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise ConfigError(field, pattern, "matches no tensor of the model", f"names are like {names[1]}")
        matched += hits
    return matched
