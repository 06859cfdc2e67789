"""Everything that a run is made of, built once from the configuration; and its state, saved and restored."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ltrain.attention.rope import Rope
from ltrain.config.base import ConfigError
from ltrain.config.schema import RunConfig
from ltrain.data.loader import Loader
from ltrain.data.rows import Row
from ltrain.data.tokenizer import Tokenizer
from ltrain.elimination.runtime import Elimination
from ltrain.metrics import devices
from ltrain.model.language_model import LanguageModel
from ltrain.model.spec import ModelSpec, model_fingerprint
from ltrain.parallel.mesh import Mesh
from ltrain.train.assignment import Assignment
from ltrain.train.checkpoint.folder import CheckpointError
from ltrain.train.checkpoint.manager import (
    CheckpointManager,
    Snapshot,
    random_state,
    set_random_state,
    snapshot,
)
from ltrain.train.checkpoint.pieces import optimizer_steps, pieces, set_optimizer_steps
from ltrain.train.checkpoint.reading import CheckpointReader, restore_pieces
from ltrain.train.replicas import Replicas
from ltrain.train.stage_links import StageLinks

log = logging.getLogger("ltrain")


@dataclass
class Run:
    """The parts of a run and where it stands.

    `step` optimizer steps and `tokens` tokens are done; `skipped_steps` of the steps changed nothing because
    a gradient was not finite.
    """

    config: RunConfig
    folder: Path
    mesh: Mesh
    spec: ModelSpec
    model: LanguageModel
    ddp: Any
    optimizer: Any
    loader: Loader
    held_out: list[Row]
    buckets: tuple[int, ...]
    assignment: Assignment
    checkpoints: CheckpointManager
    tokenizer: Tokenizer
    source_rope: Rope
    links: StageLinks
    replicas: Replicas
    elimination: Elimination | None = None
    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0

    def layout(self) -> dict[str, int]:
        """The degrees that decide which rank holds what."""
        mesh = self.mesh
        return {
            "tensor": mesh.tensor.size,
            "pipeline": mesh.pipeline.size,
            "context": mesh.context.size,
            "data": mesh.data.size,
        }

    def snapshot(self) -> Snapshot:
        """This rank's part of a checkpoint, copied to the host."""
        tensors, private = random_state()
        outer_tensors, private["sync"] = self.replicas.state()
        tensors |= outer_tensors | self.links.state()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            "rollbacks": self.rollbacks,
            "optimizer_steps": optimizer_steps(self.optimizer),
            "loader": self.loader.state_dict(),
            "assignment": self.assignment.state_dict(),
            "layout": self.layout(),
            "dtype": self.config.train.dtype,
            "fingerprint": model_fingerprint(self.spec),
        }
        return snapshot(self.step, pieces(self.model, self.optimizer, self.mesh), tensors, private, state)

    def restore(self, reader: CheckpointReader) -> None:
        """Continue from a verified checkpoint, whatever layout wrote it. Bitwise on the same layout.

        Raises CheckpointError where what it holds is not a run's state, although its checksums fit.
        """
        try:
            self._restore(reader)
        except (ConfigError, CheckpointError):
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{reader.folder.name} holds no valid state: {error!r}") from None

    def _restore(self, reader: CheckpointReader) -> None:
        state = reader.state
        restore_pieces(reader, list(pieces(self.model, self.optimizer, self.mesh)))
        set_optimizer_steps(self.optimizer, state["optimizer_steps"])
        self.loader.load_state_dict(state["loader"])
        self.assignment.load_state_dict(state.get("assignment"))
        for name in ("step", "tokens", "skipped_steps", "rollbacks"):
            setattr(self, name, int(state[name]))
        if state["layout"] == self.layout():
            rank = dist.get_rank()
            set_random_state(reader.private_tensors(rank, "rng/"), reader.private[rank])
            self.replicas.load_state(reader.private_tensors(rank, "sync/"), reader.private[rank]["sync"])
            self.links.load_state(reader.private_tensors(rank, "stage_links/"))
        else:
            self.links.start_round(loaded=True)
            if self.replicas.active:
                raise CheckpointError(
                    "the outer state of sync is bound to the layout: resume on the same degrees"
                )
            torch.manual_seed(self.config.run.seed * 1_000_003 + self.step)
        self.checkpoints.last_saved = self.step

    def restore_parameters(self, reader: CheckpointReader) -> None:
        """Take only the parameters of another run's checkpoint."""
        found = list(pieces(self.model, self.optimizer, self.mesh))
        restore_pieces(reader, found, fresh_optimizer=True)
        self.replicas.restart()

    def banner(self) -> list[str]:
        """What is about to run, for the log."""
        config, spec = self.config, self.spec
        train, context = config.train, config.parallel.context
        rows = train.tokens_per_step // train.seq_len
        context_line = (
            f"context parallelism: {context.schedule} exchange, {context.layout} layout, "
            f"blocks of {context.block}"
        )
        rows_line = f"{rows // self.mesh.data.size} micro-batches x {self.mesh.data.size} data-parallel ranks"
        if config.parallel.assignment.kind == "planned":
            pool = self.mesh.data_context.size
            context_line = f"documents dealt to groups of 1 to {pool} shards, blocks of {context.block}"
            rows_line = f"{rows} rows, cut into their documents"
        return [
            f"run {config.run.name} in {self.folder}",
            f"model {spec.family}, {spec.num_parameters / 1e6:,.1f} M parameters, {train.dtype}, "
            f"rope {config.rope.kind} at {train.seq_len} tokens",
            f"mesh {self.mesh.describe()} on {self.mesh.device.type}",
            context_line,
            f"{train.tokens_per_step} tokens a step = {train.seq_len} tokens a row x {rows_line}",
            *self._elimination_line(),
            f"steps {self.step} to {train.steps}, {len(self.held_out)} held-out rows",
        ]

    def _elimination_line(self) -> list[str]:
        if self.elimination is None:
            return []
        elimination = self.elimination
        config, ratios = elimination.config, elimination.ratios
        sparse = [ratio for ratio in ratios if ratio < 1]
        return [
            f"token elimination: mode {config.mode}, scorer {config.scorer.kind}, {len(sparse)} of "
            f"{len(ratios)} layers keep {min(sparse, default=1.0):g} to {max(sparse, default=1.0):g} of "
            f"{elimination.block}-token blocks"
        ]

    def environment(self) -> dict[str, Any]:
        """Facts that a run is reproduced from: code, versions, devices, command."""
        import megatron.core

        return {
            "commit": git_commit(),
            "command": sys.argv,
            "world_size": self.mesh.world_size,
            "mesh": self.mesh.describe(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron_core": megatron.core.__version__,
            "cuda": torch.version.cuda,
            "driver": devices.driver_version(),
            "device": torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else platform.processor() or "cpu",
            "parameters": self.spec.num_parameters,
        }


def git_commit() -> str | None:
    """The commit of the code that runs, with `+dirty` where files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            timeout=5,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+dirty" if changes.strip() else "")
