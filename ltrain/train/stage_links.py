"""The compressed stage boundaries of a run, and the adaptations that keep them exact beside SparseLoCo."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ltrain.config.schema import RunConfig
from ltrain.config.stage_links import IdentityLinks, ProjectionLinks, slow_boundaries
from ltrain.model.language_model import LanguageModel
from ltrain.model.spec import ModelSpec
from ltrain.parallel.mesh import Mesh
from ltrain.parallel.stage_link import Subspace, SubspaceLink, absorb_embedding_drift, project_writers
from ltrain.train.checkpoint.pieces import optimizer_runs

WRITERS = (".self_attention.linear_proj.weight", ".mlp.linear_fc2.weight")


class StageLinks:
    """This stage's compressed links, put into its model, and what happens to its weights because of them.

    Nothing with `parallel.stage_links.kind` identity; links only with `reparametrised`, whose layers need no
    care. With `projection` the adaptations that the section names run on the stages before the last
    compressed boundary: `start_round` when the outer state has set the parameters, `after_step` behind the
    optimizer. Both are collective over the pipeline.
    """

    def __init__(
        self, config: RunConfig, spec: ModelSpec, model: LanguageModel, optimizer: Any, mesh: Mesh
    ) -> None:
        links = config.parallel.stage_links
        self.mesh, self.model = mesh, model
        self.absorbs = self.projects = False
        self._anchors: Tensor | None = None
        self._table: Tensor | None = None
        self._writers: list[Tensor] = []
        self._runs: dict[Tensor, list[tuple[Tensor, int, int]]] = {}
        if isinstance(links, IdentityLinks):
            return
        slow = slow_boundaries(links, mesh.pipeline.size)
        self.space = Subspace(model.config.hidden_size, links.rank, links.seed)
        shape = (model.vocab_size, model.config.hidden_size)
        if isinstance(links, ProjectionLinks):
            anchors = torch.zeros(shape, device=mesh.device)
            self._anchors = anchors
            self._table = torch.zeros(shape, device=mesh.device, dtype=model.config.params_dtype)
            self.absorbs = "absorb_embedding_drift" in links.adaptations
            self.projects = "project_writers" in links.adaptations and mesh.pipeline.rank <= max(slow)
        elif mesh.pipeline.rank - 1 in slow:
            anchors = self.space.random_anchors(shape[0], spec.initializer_range)
        else:
            anchors = torch.zeros(0, shape[1])
        if mesh.pipeline.rank - 1 in slow:
            model.link_in = SubspaceLink(self.space, anchors).to(mesh.device)
        if mesh.pipeline.rank in slow:
            model.link_out = SubspaceLink(self.space, anchors).to(mesh.device)
        if self.projects:
            self._writers = [p for name, p in model.named_parameters() if name.endswith(WRITERS)]
            for part in optimizer.chained_optimizers:
                for param, main, first, last, _ in optimizer_runs(part):
                    own = main.data_ptr() == param.data_ptr() + first * param.element_size()
                    if not (own and main.dtype == param.dtype):
                        self._runs.setdefault(param, []).append((main, first, last))

    @torch.no_grad()
    def start_round(self, *, loaded: bool = False) -> None:
        """After an outer round has set the parameters: new anchors, and writers inside the subspace.

        What the round has changed of the token embedding travels to the other stages; all of it when
        parameters were `loaded`.
        """
        if self._anchors is None:
            return
        if loaded or self.absorbs:
            self._share_table(whole=loaded)
            assert self._table is not None
            self._anchors.copy_(absorb_embedding_drift(self._table.float(), self.space))
        self.after_step()

    @torch.no_grad()
    def after_step(self) -> None:
        """Adaptation `project_writers`: the writers, and the learned part of the embedding, into the
        subspace."""
        if not self.projects:
            return
        for weight in self._writers:
            before = weight.detach().float()
            inside = before.clone()
            project_writers([inside], self.space)
            self._move(weight, inside - before)
        if self.mesh.is_first_stage:
            assert self._anchors is not None
            table = self.model.embedding.word_embeddings.weight
            outside = self.space.outside(table.detach().float())
            self._move(table, self._anchors - outside)

    def _move(self, parameter: Tensor, change: Tensor) -> None:
        """Add to a parameter and to the runs of it that this rank's optimizer holds."""
        parameter.copy_(parameter.float() + change)
        for main, first, last in self._runs.get(parameter, []):
            main.add_(change.view(-1)[first:last].to(main.device).view_as(main))

    def _share_table(self, *, whole: bool) -> None:
        """Send the token embedding, or its entries that have changed, from the first stage to the others."""
        assert self._table is not None
        source, group = self.mesh.pipeline.ranks[0], self.mesh.pipeline.group
        flat = self._table.view(-1)
        new = flat
        if self.mesh.is_first_stage:
            new = self.model.embedding.word_embeddings.weight.detach().reshape(-1)
        if whole:
            flat.copy_(new)
            dist.broadcast(self._table, source, group=group)
            return
        changed = (new != flat).nonzero().view(-1)
        count = torch.tensor([len(changed)], device=flat.device)
        dist.broadcast(count, source, group=group)
        if not self.mesh.is_first_stage:
            changed = torch.empty(int(count), dtype=torch.int64, device=flat.device)
        dist.broadcast(changed, source, group=group)
        values = new[changed] if self.mesh.is_first_stage else torch.empty_like(flat[: int(count)])
        dist.broadcast(values, source, group=group)
        flat[changed] = values

    def bytes_sent(self) -> dict[str, float]:
        """Bytes of activations and gradients over compressed boundaries since the last call, as a metric."""
        links = [link for link in (self.model.link_in, self.model.link_out) if link is not None]
        if not links:
            return {}
        total = sum(link.bytes_sent for link in links)
        for link in links:
            link.bytes_sent = 0
        return {"comm/bytes_stage_links": float(total)}

    def state(self) -> dict[str, Tensor]:
        """What a bitwise resume needs beside the parameters, by path."""
        if self._anchors is None or self._table is None:
            return {}
        return {"stage_links/anchors": self._anchors, "stage_links/table": self._table}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`; `tensors` are named without the `stage_links/` prefix."""
        if self._anchors is not None and self._table is not None:
            self._anchors.copy_(tensors["anchors"])
            self._table.copy_(tensors["table"])
