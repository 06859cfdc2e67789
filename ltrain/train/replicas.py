"""Joining replicas of a run over slow links: what of this rank is synchronised, and how it goes back into the
model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ltrain.config.base import ConfigError
from ltrain.config.schema import RunConfig
from ltrain.parallel import seam
from ltrain.parallel.mesh import Mesh
from ltrain.sync import SyncReport, build_sync
from ltrain.train.checkpoint.pieces import pieces, tensor_key


class Replicas:
    """This rank's part of the synchronisation with its counterparts in other replicas.

    The tensors are those that the optimizer steps: fp32 main copies where parameters are bf16. With the
    distributed optimizer each rank owns a run of every parameter and sends only that; without it the ranks of
    one model copy would send the same, so that needs one rank a copy. Collective where mcore's parameter
    gather is.
    """

    def __init__(self, config: RunConfig, model: Any, ddp: Any, optimizer: Any, mesh: Mesh) -> None:
        self.config, self.ddp, self.optimizer = config, ddp, optimizer
        section = config.sync
        self.active = section.peers is not None
        if self.active and not config.optimizer.distributed and mesh.data_context.size > 1:
            raise ConfigError(
                "optimizer.distributed",
                False,
                "must be true with sync.peers and several ranks a model copy",
                "each rank then sends its own run of the parameters",
            )
        self.tensors: dict[str, Tensor] = {}
        if self.active:
            self.tensors = _stepped_tensors(model, optimizer, mesh)
        self.sync = build_sync(
            section,
            self.tensors or {"none": torch.zeros(1)},
            model=f"{config.model.kind} {config.train.seq_len} {config.train.dtype}",
            rank=mesh.rank,
            num_ranks=mesh.world_size,
        )

    def after_step(self, step: int) -> SyncReport | None:
        """Run a round when it is due, and put what it changed back into the model."""
        report = self.sync.after_step(step)
        if report is not None:
            self._write_back()
        return report

    def finish(self) -> SyncReport | None:
        """Complete a delayed round, so that all replicas hold the same parameters."""
        report = self.sync.finish()
        if report is not None:
            self._write_back()
        return report

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
    def _write_back(self) -> None:
        with seam.cpu_seam():
            for part in self.optimizer.chained_optimizers:
                if hasattr(part, "_copy_main_params_to_model_params"):
                    part._copy_main_params_to_model_params()
            if self.config.optimizer.distributed:
                self.ddp.start_param_sync(force_sync=True)


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
