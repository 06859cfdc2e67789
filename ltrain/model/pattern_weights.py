"""Weights of an attention pattern's own (the gate of `seer_gate`, the branches of `nsa`): names, first
values, files.

A pattern makes one module a layer, `core_attention.learned`, whose parameters all begin with a dimension of
heads and are sharded by it. In a Hugging Face folder they lie in a file of their own, which transformers does
not look at: the model loads without them and attends densely.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ltrain.attention.patterns import Pattern
from ltrain.config.base import ConfigError
from ltrain.model.families import read_spec
from ltrain.model.families.base import read_json
from ltrain.model.sharding import Piece, Shard
from ltrain.model.sources import named_normal
from ltrain.model.spec import ModelSpec
from ltrain.model.tensors_out import TensorFiles, gather_to_first
from ltrain.parallel.mesh import Mesh

FACTS = "attention_pattern.json"
WEIGHTS = "attention_pattern.safetensors"
LEARNED = ".core_attention.learned."


def whole_module(spec: ModelSpec, pattern: Pattern) -> nn.Module | None:
    """The pattern's module of one unsharded layer, without storage."""
    with torch.device("meta"):
        return pattern.make_module(
            num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim
        )


def pattern_shapes(spec: ModelSpec, pattern: Pattern) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the pattern's own, over all layers that use it."""
    module = whole_module(spec, pattern)
    if module is None:
        return {}
    return {
        _name(layer, pattern, name): tuple(parameter.shape)
        for layer in range(spec.num_layers)
        if not pattern.is_dense_layer(layer, spec.num_layers)
        for name, parameter in module.named_parameters()
    }


def pattern_shards(
    spec: ModelSpec, pattern: Pattern, *, stage: int, stages: int, tensor_rank: int, tensor_size: int
) -> dict[str, Shard]:
    """The pattern's parameters of a rank by their names in the model, each one piece of a whole tensor."""
    module, per_stage = whole_module(spec, pattern), spec.num_layers // stages
    shards: dict[str, Shard] = {}
    for local in range(per_stage):
        layer = stage * per_stage + local
        if module is None or pattern.is_dense_layer(layer, spec.num_layers):
            continue
        for name, parameter in module.named_parameters():
            heads = parameter.shape[0] // tensor_size
            piece = Piece(_name(layer, pattern, name), 0, tensor_rank * heads, (tensor_rank + 1) * heads, 0)
            key = f"decoder.layers.{local}.self_attention{LEARNED}{name}"
            shards[key] = Shard((heads, *parameter.shape[1:]), (piece,))
    return shards


def stored_pattern(
    spec: ModelSpec, pattern: Pattern, fields: tuple[str, str] = ("model.path", "attention.pattern")
) -> Path | None:
    """The file beside the source model that holds this pattern's weights, if there is one.

    Raises ConfigError, with the user's names of model and pattern in `fields`, where it is damaged or of
    other shapes; weights of another pattern are left alone.
    """
    if spec.source is None or not (spec.source / FACTS).exists():
        return None
    shapes = pattern_shapes(spec, pattern)
    if not shapes or read_json(spec.source / FACTS).get("pattern", {}).get("kind") != pattern.kind:
        return None
    path = spec.source / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors wraps the system's error
        raise ConfigError(fields[0], str(path), f"can't be read ({error})", "copy it again") from None
    if found != shapes:
        name = next(n for n in [*shapes, *found] if shapes.get(n) != found.get(n))
        rule = f"holds {name} with shape {found.get(name)}, the pattern has {shapes.get(name)}"
        fix = "take the pattern of attention_pattern.json, and the file that was exported with this model"
        raise ConfigError(fields[1], str(path), rule, fix)
    return path


def check_stored(folder: Path, pattern: Pattern) -> None:
    """Raise ConfigError unless a model folder can run under `pattern`: weights of the pattern's own must lie
    in it, of this kind and shapes.
    """
    if not pattern.capabilities.learned:
        return
    spec, path, kind = read_spec(folder), folder / WEIGHTS, pattern.kind
    if not pattern_shapes(spec, pattern):
        return
    for name in (FACTS, WEIGHTS):
        if not (folder / name).exists():
            rule = f"has weights of its own, and {folder / name} is not there"
            raise ConfigError("--attention", kind, rule, "copy it from the export, or use --attention dense")
    stored = read_json(folder / FACTS).get("pattern", {}).get("kind")
    if stored != kind:
        rule = f"has weights of its own, and {path} holds those of {stored}"
        raise ConfigError("--attention", kind, rule, f"use {stored} or dense")
    stored_pattern(spec, pattern, fields=("MODEL", "--attention"))


def load_modules(
    spec: ModelSpec, pattern: Pattern, *, device: torch.device, dtype: torch.dtype
) -> dict[int, nn.Module]:
    """The pattern's module of every layer that has one, with the weights of the model's folder.

    Raises ConfigError as `check_stored`.
    """
    if not pattern_shapes(spec, pattern):
        return {}
    assert spec.source is not None
    check_stored(spec.source, pattern)
    stored, modules = load_file(spec.source / WEIGHTS), {}
    for layer in range(spec.num_layers):
        module = whole_module(spec, pattern)
        if module is None or pattern.is_dense_layer(layer, spec.num_layers):
            continue
        weights = {name: stored[_name(layer, pattern, name)] for name, _ in module.named_parameters()}
        module.load_state_dict(weights, assign=True)
        modules[layer] = module.to(device, dtype).eval().requires_grad_(False)
    return modules


@torch.no_grad()
def init_pattern(model: nn.Module, spec: ModelSpec, pattern: Pattern, mesh: Mesh, *, seed: int) -> None:
    """Fill this rank's pattern weights from the source model's folder, or from `seed` and their names.

    Independent of the layout. No communication.
    """
    module = whole_module(spec, pattern)
    if module is None:
        return
    shapes, path = pattern_shapes(spec, pattern), stored_pattern(spec, pattern)
    parameters = dict(model.named_parameters())
    for name, shard in _shards_of(spec, pattern, mesh)(mesh.pipeline.rank, mesh.tensor.rank).items():
        piece = shard.pieces[0]
        if path is not None:
            with safe_open(path, framework="pt") as file:
                values = file.get_slice(piece.name)[piece.start : piece.stop]
        else:
            std = float(module.init_std)  # type: ignore[arg-type]
            values = named_normal(piece.name, shapes[piece.name], std, seed)[piece.start : piece.stop]
        parameters[name].copy_(values)


class PatternFiles:
    """The pattern's two files of a model folder in the making."""

    def __init__(
        self, folder: Path, spec: ModelSpec, pattern: Pattern, block: int, dtype: torch.dtype
    ) -> None:
        self.folder, self.pattern, self.block = folder, pattern, block
        shapes = pattern_shapes(spec, pattern)
        self.files = TensorFiles(folder, shapes, dict.fromkeys(shapes, WEIGHTS), dtype)

    def finish(self) -> None:
        """All weights are there: write what they are."""
        self.files.check_complete()
        facts = {
            "format": "ltrain attention pattern 1",
            "pattern": self.pattern.model_dump(mode="json"),
            "block": self.block,
            "weights": WEIGHTS,
            "without_it": "the model's own weights are complete: without this file it attends densely",
        }
        (self.folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def gather_pattern(
    model: nn.Module,
    spec: ModelSpec,
    pattern: Pattern,
    mesh: Mesh,
    dtype: torch.dtype,
    take: Callable[[Shard, Tensor], None],
) -> None:
    """Hand every rank's pattern weights to `take` on rank 0. Collective."""
    parameters: dict[str, Any] = dict(model.named_parameters())
    shards_of = _shards_of(spec, pattern, mesh)
    own = shards_of(mesh.pipeline.rank, mesh.tensor.rank)
    gather_to_first(mesh, shards_of, {n: partial(parameters.__getitem__, n) for n in own}, dtype, take)


def _shards_of(spec: ModelSpec, pattern: Pattern, mesh: Mesh) -> Callable[[int, int], dict[str, Shard]]:
    def shards(stage: int, tensor_rank: int) -> dict[str, Shard]:
        return pattern_shards(
            spec,
            pattern,
            stage=stage,
            stages=mesh.pipeline.size,
            tensor_rank=tensor_rank,
            tensor_size=mesh.tensor.size,
        )

    return shards


def _name(layer: int, pattern: Pattern, name: str) -> str:
    return f"model.layers.{layer}.self_attn.{pattern.kind}.{name}"
