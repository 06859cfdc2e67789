"""Weights in and out: Hugging Face folders to sharded parameters and back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ltrain.attention.patterns import Pattern
from ltrain.config.base import ConfigError
from ltrain.config.model import LoraAdapter
from ltrain.model.attention_file import trained_attention
from ltrain.model.export_files import AdapterWriter, FolderWriter, SavesTokenizer
from ltrain.model.lora import adapter_shapes, adapter_shards
from ltrain.model.pattern_weights import LEARNED, PatternFiles, gather_pattern, pattern_shapes
from ltrain.model.sharding import Shard, stage_shards
from ltrain.model.sources import RandomSource, SafetensorsSource, WeightSource
from ltrain.model.spec import ModelSpec
from ltrain.model.subspace import SubspaceWriter
from ltrain.model.tensors_out import FirstRankErrors, gather_to_first
from ltrain.parallel.mesh import Mesh

# Share of a stored tensor's norm that may lie outside of the subspace: rounding to bfloat16 stays below it.
SUBSPACE_TOLERANCE = 0.01


def import_model(model: nn.Module, spec: ModelSpec, mesh: Mesh, *, seed: int = 0) -> None:
    """Fill this rank's stage and shard from `spec.source`, or from random numbers by `seed` if it has none.

    Only the slices that the rank holds are read; values are cast to the parameters' type. No communication.
    """
    shards = _shards(spec, mesh, mesh.pipeline.rank, mesh.tensor.rank)
    if spec.source is None:
        fill(model, shards, RandomSource(spec, seed))
        return
    with SafetensorsSource(spec.source, spec) as source:
        fill(model, shards, source)


@torch.no_grad()
def fill(model: nn.Module, shards: dict[str, Shard], source: WeightSource) -> None:
    """Copy every shard's pieces from `source` into the parameter of that name; padding becomes zero."""
    for name, parameter in base_parameters(model, shards).items():
        shard = shards[name]
        module = _module(model, name)
        into = torch.empty(shard.shape) if isinstance(module, SubspaceWriter) else parameter
        filled = sum(piece.stop - piece.start for piece in shard.pieces)
        if not shard.pieces or filled < shard.shape[shard.pieces[0].dim]:
            into.zero_()
        for piece in shard.pieces:
            values = source.read(piece.name, piece.dim, piece.start, piece.stop)
            into.narrow(piece.dim, piece.offset, piece.stop - piece.start).copy_(values)
        if isinstance(module, SubspaceWriter):
            lost = module.load_merged(into)
            if isinstance(source, SafetensorsSource) and lost > SUBSPACE_TOLERANCE:
                raise ConfigError(
                    "parallel.stage_links.kind",
                    "reparametrised",
                    f"would lose {lost:.1%} of {name}, which does not lie in its subspace",
                    "start from a new model, or from one trained so with this rank and seed",
                )


def base_parameters(model: nn.Module, shards: dict[str, Shard]) -> dict[str, nn.Parameter]:
    """The model's parameters by name, adapters and pattern weights left out, checked against the map."""
    parameters = {
        name: p for name, p in model.named_parameters() if ".lora_" not in name and LEARNED not in name
    }
    if set(parameters) != set(shards):
        raise RuntimeError(f"parameters and map differ: {sorted(set(parameters) ^ set(shards))}")
    for name, parameter in parameters.items():
        if isinstance(_module(model, name), SubspaceWriter):
            continue
        if tuple(parameter.shape) != shards[name].shape:
            raise RuntimeError(
                f"{name} has shape {tuple(parameter.shape)}, the map says {shards[name].shape}"
            )
    return {name: parameters[name] for name in shards}


def export_model(
    model: nn.Module,
    spec: ModelSpec,
    mesh: Mesh,
    folder: Path,
    *,
    tokenizer: SavesTokenizer | None = None,
    pattern: Pattern | None = None,
    block: int = 128,
    max_file_bytes: int = 4 << 30,
) -> None:
    """Write the model as a Hugging Face folder that replaces `folder` only once it is whole. Collective.

    Adapters are merged. `pattern`, in blocks of `block` tokens, is what the model was trained to attend:
    `ltrain.json` names it, and weights that it learned go to files of their own. Rank 0 receives one
    parameter at a time and holds at most about one file (`max_file_bytes`) in memory. The tensors keep the
    parameters' type. Raises OSError or ConfigError, on every rank, where the folder can't be written.
    """
    parameters = base_parameters(model, _shards(spec, mesh, mesh.pipeline.rank, mesh.tensor.rank))
    dtype = next(iter(parameters.values())).dtype
    values = {name: partial(_value, model, name) for name in parameters}
    failure = FirstRankErrors(mesh)
    writer: list[FolderWriter] = []
    failure.guard(lambda: writer.append(FolderWriter(folder, spec, dtype, max_file_bytes)))
    failure.raise_together()

    def take(shard: Shard, value: Tensor) -> None:
        failure.guard(lambda: writer[0].files.add(shard, value))

    gather_to_first(mesh, partial(_shards, spec, mesh), values, dtype, take)
    if pattern is not None and pattern_shapes(spec, pattern):
        extra: list[PatternFiles] = []
        failure.guard(lambda: extra.append(PatternFiles(writer[0].partial, spec, pattern, block, dtype)))

        def take_learned(shard: Shard, value: Tensor) -> None:
            failure.guard(lambda: extra[0].files.add(shard, value))

        gather_pattern(model, spec, pattern, mesh, dtype, take_learned)
        failure.guard(lambda: extra[0].finish())
    trained = None if pattern is None else trained_attention(pattern, block)
    failure.guard(lambda: writer[0].finish(tokenizer, trained))
    if failure.error is not None:
        writer[0].abandon()
    failure.raise_together()


def export_adapter(model: nn.Module, spec: ModelSpec, lora: LoraAdapter, mesh: Mesh, folder: Path) -> None:
    """Write the adapter alone, as `peft` loads it, and its model's config.json. Collective.

    The base model must be loaded with that config.json, which holds the changed rope.
    """
    if lora.also_train:
        rule = "trains weights that a PEFT adapter doesn't hold"
        raise ConfigError("model.adapter.also_train", lora.also_train, rule, "export the merged model")

    def shards_of(stage: int, tensor_rank: int) -> dict[str, Shard]:
        return adapter_shards(
            spec,
            lora,
            stage=stage,
            stages=mesh.pipeline.size,
            tensor_rank=tensor_rank,
            tensor_size=mesh.tensor.size,
        )

    parameters = dict(model.named_parameters())
    own = shards_of(mesh.pipeline.rank, mesh.tensor.rank)
    values = {name: partial(parameters.__getitem__, name) for name in own}
    dtype = parameters[next(iter(own))].dtype
    failure = FirstRankErrors(mesh)
    writer: list[AdapterWriter] = []
    failure.guard(lambda: writer.append(AdapterWriter(folder, spec, lora, adapter_shapes(spec, lora), dtype)))
    failure.raise_together()

    def take(shard: Shard, value: Tensor) -> None:
        failure.guard(lambda: writer[0].files.add(shard, value))

    gather_to_first(mesh, shards_of, values, dtype, take)
    failure.guard(lambda: writer[0].finish())
    if failure.error is not None:
        writer[0].abandon()
    failure.raise_together()


def _module(model: nn.Module, name: str) -> nn.Module:
    """The module that holds a parameter."""
    return model.get_submodule(name.rpartition(".")[0])


def _value(model: nn.Module, name: str) -> Tensor:
    """A parameter as the checkpoint has it: its adapter merged into it, its subspace multiplied out."""
    module = _module(model, name)
    if name.endswith(".weight") and hasattr(module, "merged_weight"):
        return module.merged_weight()
    return model.get_parameter(name)


def _shards(spec: ModelSpec, mesh: Mesh, stage: int, tensor_rank: int) -> dict[str, Shard]:
    return stage_shards(
        spec, stage=stage, stages=mesh.pipeline.size, tensor_rank=tensor_rank, tensor_size=mesh.tensor.size
    )
