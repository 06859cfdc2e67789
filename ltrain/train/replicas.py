"""Joining replicas of a run over slow links: what of this rank is synchronised, and how it goes back into the
model.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ltrain.config.base import ConfigError
from ltrain.config.schema import RunConfig
from ltrain.model.spec import ModelSpec, model_facts
from ltrain.parallel import seam
from ltrain.parallel.mesh import Mesh
from ltrain.sync import SyncReport, build_sync
from ltrain.train.checkpoint.pieces import pieces, tensor_key
from ltrain.train.stage_links import StageLinks


class Replicas:
    """This rank's part of the synchronisation with its counterparts in other replicas.

    The tensors are those that the optimizer steps: fp32 main copies where parameters are bf16. With the
    distributed optimizer each rank owns a run of every parameter and sends only that; without it the ranks of
    one model copy would send the same, so that needs one rank a copy. `sync.peers.stages` cuts them into
    shards, so that a replica in one process exchanges with one that is a pipeline. Collective where mcore's
    parameter gather and the stage links are.
    """

    def __init__(
        self,
        config: RunConfig,
        spec: ModelSpec,
        model: Any,
        ddp: Any,
        optimizer: Any,
        mesh: Mesh,
        links: StageLinks,
    ) -> None:
        self.config, self.ddp, self.optimizer, self.links = config, ddp, optimizer, links
        section = config.sync
        self.active = section.peers is not None
        shard_of = None
        if section.peers is not None:
            if not config.optimizer.distributed and mesh.data_context.size > 1:
                raise ConfigError(
                    "optimizer.distributed",
                    False,
                    "must be true with sync.peers and several ranks a model copy",
                    "each rank then sends its own run of the parameters",
                )
            shard_of = partial(_shard_of, stages=section.peers.stages, spec=spec, mesh=mesh)
        self.tensors: dict[str, Tensor] = {}
        if self.active:
            self.tensors = _stepped_tensors(model, optimizer, mesh)
        self.sync = build_sync(
            section,
            self.tensors or {"none": torch.zeros(1)},
            model=f"{model_facts(spec)} seq_len {config.train.seq_len} {config.train.dtype}",
            shard_of=shard_of,
            rank=mesh.rank,
            num_ranks=mesh.world_size,
            adapts=links.projects,
        )

    def join(self) -> None:
        """Meet the other replicas, before the first step; who is behind takes their state."""
        if self.sync.join():
            self._write_back()

    def after_step(self, step: int) -> SyncReport | None:
        """Run a round when it is due, and put what it changed back into the model."""
        self.join()
        report = self.sync.after_step(step)
        if report is not None:
            self._write_back()
        return report

    def finish(self) -> SyncReport | None:
        """Complete a round under way, so that all replicas hold the same parameters, projected ones too."""
        report = self.sync.finish()
        if report is not None or self.links.projects:
            self._write_back(last=True)
        return report

    def restart(self) -> None:
        """Begin from the parameters as they are now: what a run does that was built or given weights."""
        self.sync.restart()
        self.start_local(loaded=True)

    def start_local(self, *, loaded: bool = False) -> None:
        """What the stage links do to parameters that were set from outside; local progress is counted from
        it."""
        self.links.start_round(loaded=loaded)
        if self.links.projects:
            self.sync.count_from_here()

    def close(self) -> None:
        self.sync.close()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, by path, and plain values of the outer state: this rank's part of a checkpoint."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for key, value in self.sync.state_dict().items():
            if isinstance(value, dict):
                values[key] = sorted(value)
                tensors |= {f"sync/{key}/{name}": tensor for name, tensor in value.items()}
            else:
                values[key] = value
        return tensors, values

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """The inverse of `state`; `tensors` are named without the `sync/` prefix."""
        if not values:
            return
        state = {
            key: {name: tensors[f"{key}/{name}"] for name in value} if isinstance(value, list) else value
            for key, value in values.items()
        }
        self.sync.load_state_dict(state)

    @torch.no_grad()
    def _write_back(self, *, last: bool = False) -> None:
        with seam.cpu_seam():
            for part in self.optimizer.chained_optimizers:
                if hasattr(part, "_copy_main_params_to_model_params"):
                    part._copy_main_params_to_model_params()
            if self.config.optimizer.distributed:
                self.ddp.start_param_sync(force_sync=True)
        if not last:
            self.start_local()


def _shard_of(name: str, *, stages: int, spec: ModelSpec, mesh: Mesh) -> str:
    """The stage that a tensor belongs to in the longest pipeline, and this rank's part of it."""
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer:
        stage = int(layer[1]) // (spec.num_layers // stages)
    else:
        stage = 0 if name.startswith("embedding.") else stages - 1
    shard = f"stage{stage}"
    if mesh.tensor.size > 1:
        shard += f"/tensor{mesh.tensor.rank}of{mesh.tensor.size}"
    if mesh.data_context.size > 1:
        shard += f"/part{mesh.data_context.rank}of{mesh.data_context.size}"
    return shard


def _stepped_tensors(model: Any, optimizer: Any, mesh: Mesh) -> dict[str, Tensor]:
    """What the optimizer steps on this rank, by global name and place."""
    found: dict[str, Tensor] = {}
    runs = [piece for piece in pieces(model, optimizer, mesh) if piece.kind == "exp_avg"]
    mains = {tensor_key(p, "main"): p.tensor for p in pieces(model, optimizer, mesh) if p.kind == "main"}
    whole = {piece.place.name: piece.tensor for piece in pieces(model, None, mesh)}
    for piece in runs:
        key = tensor_key(piece, "main")
        main = mains.get(key)
        if main is None:  # fp32 parameters are stepped in place
            main = whole[piece.place.name].view(-1)[piece.place.first : piece.place.last]
        found[key.removeprefix("main/")] = main.detach()
    return found
