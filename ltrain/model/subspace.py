"""mcore's residual writers with weights that can write into one subspace only
(`ltrain.parallel.stage_link`)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from ltrain.parallel.stage_link import Subspace


class SubspaceWriter:
    """What both kinds share: the parameter holds coordinates in the subspace, the checkpoint whole
    tensors."""

    weight: nn.Parameter
    basis: Tensor

    def merged_weight(self) -> Tensor:
        """The whole tensor that the coordinates stand for, in the weight's type."""
        raise NotImplementedError

    def load_merged(self, whole: Tensor) -> float:
        """Take the coordinates of a whole tensor; returns the share of its norm that is lost."""
        raise NotImplementedError

    def _lost(self, whole: Tensor) -> float:
        norm = float(whole.norm())
        return float((self.merged_weight().to(whole) - whole).norm()) / norm if norm else 0.0


class SubspaceRowParallelLinear(RowParallelLinear, SubspaceWriter):
    """A residual writer y = U (A x); the weight is A [rank, inputs]. The partial sums of A x are reduced."""

    def __init__(self, input_size: int, output_size: int, *args: Any, space: Subspace, **kwargs: Any) -> None:
        super().__init__(input_size, space.rank, *args, **kwargs)
        self.register_buffer("basis", space.basis.clone(), persistent=False)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        coordinates, bias = super().forward(input_)
        return coordinates @ self.basis.to(coordinates.dtype).t(), bias

    def merged_weight(self) -> Tensor:
        return (self.basis @ self.weight.float()).to(self.weight.dtype)

    @torch.no_grad()
    def load_merged(self, whole: Tensor) -> float:
        self.weight.copy_(self.basis.t() @ whole.to(self.basis))
        return self._lost(whole)


class SubspaceWordEmbedding(VocabParallelEmbedding, SubspaceWriter):
    """Token embedding anchor + E U^T with frozen anchors of `std`; the weight is E [vocab, rank].

    Made from the embedding that it replaces, which is not tensor-parallel.
    """

    def __init__(
        self, replaced: VocabParallelEmbedding, space: Subspace, std: float, config: TransformerConfig
    ) -> None:
        super().__init__(
            replaced.num_embeddings,
            space.rank,
            init_method=lambda weight: weight,
            reduce_scatter_embeddings=replaced.reduce_scatter_embeddings,
            config=config,
            tp_group=replaced.tp_group,
        )
        self.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
        self.register_buffer("basis", space.basis.clone(), persistent=False)
        anchors = space.random_anchors(replaced.num_embeddings, std)
        self.register_buffer("anchors", anchors, persistent=False)
        self.anchors: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        learned = super().forward(ids)
        return (self.anchors[ids] + learned.float() @ self.basis.t()).to(learned.dtype)

    def merged_weight(self) -> Tensor:
        return (self.anchors + self.weight.float() @ self.basis.t()).to(self.weight.dtype)

    @torch.no_grad()
    def load_merged(self, whole: Tensor) -> float:
        self.weight.copy_(whole.to(self.basis) @ self.basis)
        return self._lost(whole)
