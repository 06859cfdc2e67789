"""What crosses a pipeline stage boundary: activations as they are, or their part in a shared small subspace.

A residual stream x [..., hidden] is split into an anchor, which both ends know from the token ids and which
is orthogonal to the subspace, and a rest. z = x U crosses, `rank` numbers a token, and the other end has x'
= z U^T + anchor. Backward, the gradient dL/dz = (dL/dx') U crosses, `rank` numbers again. With U orthonormal
nothing is lost exactly when the rest lies in the columns of U: when the residual writers (attention output,
MLP output, embedding beside its anchor) write nowhere else and no trainable gain stands behind them.

Sources: Protocol Models, arXiv 2506.01260 (subspace, anchors); arXiv 2601.02360 (selective use beside
SparseLoCo, equations 3 and 4).
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor, nn

from ltrain.config.base import ConfigError

LinkKind = Literal["identity", "projection", "reparametrised"]


class Subspace:
    """An orthonormal basis U [hidden, rank] from a seed.

    Made on the CPU in float64, so that every process of a run derives the same bytes; `digest` goes into what
    replicas must agree in. Raises ConfigError where rank is not in 1..hidden.
    """

    def __init__(self, hidden: int, rank: int, seed: int) -> None:
        if not 1 <= rank <= hidden:
            rule = f"must be in 1..hidden_size={hidden}"
            raise ConfigError("parallel.stage_links.rank", rank, rule)
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(hidden, rank, generator=generator, dtype=torch.float64)
        basis, upper = torch.linalg.qr(gaussian)
        # Fixes the signs that QR leaves open.
        self.basis = (basis * upper.diagonal().sign()).float()
        self.hidden, self.rank, self.seed = hidden, rank, seed

    def random_anchors(self, vocab: int, std: float) -> Tensor:
        """A frozen table [vocab, hidden] of normal rows, without their part in the subspace."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        return self.outside(torch.randn(vocab, self.hidden, generator=generator)) * std

    def outside(self, x: Tensor) -> Tensor:
        """x - x U U^T, for rows x [..., hidden]: what a link would lose of them."""
        basis = self.basis.to(x)
        return x - (x @ basis) @ basis.t()

    @property
    def digest(self) -> str:
        """SHA-256 of the basis."""
        return hashlib.sha256(self.basis.numpy().tobytes()).hexdigest()


class SubspaceLink(nn.Module):
    """One compressed boundary: `send` at the end of a stage, `receive` at the start of the next.

    anchors: the table [vocab, hidden] of both ends, orthogonal to the subspace; it may be replaced between
    steps. A boundary that is not compressed has no link.
    """

    def __init__(self, space: Subspace, anchors: Tensor) -> None:
        super().__init__()
        self.space = space
        self.register_buffer("basis", space.basis.clone(), persistent=False)
        self.register_buffer("anchors", anchors, persistent=False)
        self.basis: Tensor
        self.anchors: Tensor
        self.bytes_sent = 0
        """What this end has sent: activations, or gradients of what it received."""

    def send(self, x: Tensor) -> Tensor:
        """What crosses: x [..., hidden] -> [..., rank], in the type of x."""
        z = x @ self.basis.to(x.dtype)
        self._count(z)
        return z

    def receive(self, z: Tensor, ids: Tensor) -> Tensor:
        """The stream at the other end: z [..., rank], ids [...] -> [..., hidden], in the type of z.

        The sum is formed in fp32: an anchor is larger than what the layers add to it.
        """
        if z.requires_grad:
            z.register_hook(self._count)
        return (z.float() @ self.basis.t() + self.anchors[ids].float()).to(z.dtype)

    def _count(self, sent: Tensor) -> None:
        self.bytes_sent += sent.numel() * sent.element_size()

    @torch.no_grad()
    def loss_of(self, x: Tensor, ids: Tensor) -> float:
        """Share of the norm of x that the link loses."""
        return float((self.receive(self.send(x), ids) - x).norm() / x.norm())


class SubspaceLinear(nn.Module):
    """A residual writer y = (x A^T) U^T: its weight U A can only write into the subspace.

    Fewer parameters than a full matrix, no projection step, any optimizer. There is no bias.
    """

    def __init__(self, in_features: int, space: Subspace) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(space.rank, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)
        self.register_buffer("basis", space.basis.clone(), persistent=False)
        self.basis: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) @ self.basis.to(x.dtype).t()


class SubspaceEmbedding(nn.Module):
    """Token embedding anchor + E U^T: anchors are frozen and known everywhere, E [vocab, rank] is learned."""

    def __init__(self, space: Subspace, vocab: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab, space.rank))
        self.register_buffer("basis", space.basis.clone(), persistent=False)
        self.register_buffer("anchors", space.random_anchors(vocab, std), persistent=False)
        self.basis: Tensor
        self.anchors: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return self.anchors[ids] + self.weight[ids] @ self.basis.t()


@torch.no_grad()
def project_writers(weights: list[Tensor], space: Subspace) -> float:
    """Adaptation `project_writers`: W <- U U^T W for the residual writers [hidden, in] before a slow link.

    Exchanged pseudo-gradients are not in the subspace. Replicas with compressed links call this after the
    outer state has copied theta to them; the global parameters stay unprojected, and what is discarded here
    must be part of the start from which the next pseudo-gradient is measured. Returns the discarded share of
    the norm.
    """
    lost = total = 0.0
    for weight in weights:
        outside = space.outside(weight.t()).t()
        lost += float(outside.square().sum())
        total += float(weight.square().sum())
        weight.sub_(outside)
    return (lost / total) ** 0.5 if total else 0.0


@torch.no_grad()
def absorb_embedding_drift(table: Tensor, space: Subspace) -> Tensor:
    """Adaptation `absorb_embedding_drift`: the anchors of a token table [vocab, hidden] after a sync.

    Equations 3 and 4 of arXiv 2601.02360 split the table in a learned part T_S, which lies in the subspace,
    and a static part: T_S <- T_S U U^T, static <- static + (T_S - T_S U U^T). The static part is therefore
    always what the table of the last sync has outside of the subspace. Every stage at a compressed link must
    hold the result before the next micro-batch.
    """
    return space.outside(table)
