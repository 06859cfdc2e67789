"""What crosses a pipeline stage boundary: activations as they are, or their part in a shared small subspace.

A residual stream x [..., d] is split into an anchor that both ends can compute from token ids and a rest. The
rest is sent as k numbers, z = (x - anchor) U; the other end has x' = z U^T + anchor. Backward, the gradient
dL/dz = (dL/dx') U crosses, k numbers again. With U orthonormal nothing is lost exactly when the rest lies in
the columns of U. `SubspaceLinear` and `SubspaceEmbedding` are layers that can write nowhere else, under any
optimizer; a trainable gain behind a residual writer would leave the subspace and is not part of them.

Sources: Protocol Models, arXiv 2506.01260 (subspace, anchors); arXiv 2601.02360 (selective use beside
SparseLoCo).
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor, nn

from ltrain.config.base import ConfigError

LinkKind = Literal["identity", "projection", "constrained"]


class Subspace:
    """An orthonormal basis U [hidden, rank] and a frozen anchor table [vocab, hidden], both from a seed.

    Made on the CPU in float64, so that every process of a run derives the same bytes; `digest` goes into the
    settings on which replicas must agree. Raises ConfigError where rank is not in 1..hidden.
    """

    def __init__(self, hidden: int, rank: int, vocab: int, seed: int, anchor_std: float = 1.0) -> None:
        if not 1 <= rank <= hidden:
            raise ConfigError("stage_link.rank", rank, f"must be in 1..hidden_size={hidden}")
        generator = torch.Generator().manual_seed(seed)
        gaussian = torch.randn(hidden, rank, generator=generator, dtype=torch.float64)
        basis, upper = torch.linalg.qr(gaussian)
        # Fixes the signs that QR leaves open.
        self.basis = (basis * upper.diagonal().sign()).float()
        self.anchors = torch.randn(vocab, hidden, generator=generator) * anchor_std
        self.hidden, self.rank = hidden, rank

    @property
    def digest(self) -> str:
        """SHA-256 over basis and anchors."""
        total = hashlib.sha256(self.basis.numpy().tobytes())
        total.update(self.anchors.numpy().tobytes())
        return total.hexdigest()


class _Wire(torch.autograd.Function):
    """Rounds to the wire's dtype in both directions: activations forward, their gradients backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype  # type: ignore[attr-defined]
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        return grad.to(ctx.dtype).to(grad.dtype), None  # type: ignore[attr-defined]


class StageLink(nn.Module):
    """One boundary between stages; the identity unless a subclass says otherwise.

    `send` runs at the end of a stage and `receive` at the start of the next; what lies between, and its
    gradient, is all that crosses the link. `forward` is both, for use inside one process.
    """

    kind: LinkKind = "identity"

    def __init__(self, hidden: int, wire_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.hidden, self.wire_dtype = hidden, wire_dtype

    @property
    def width(self) -> int:
        """Numbers a token that cross the link."""
        return self.hidden

    def bytes_per_token(self) -> int:
        """Bytes a token that cross the link each way, without the token ids."""
        return self.width * self.wire_dtype.itemsize

    def send(self, x: Tensor, ids: Tensor) -> Tensor:
        """What crosses: x [..., hidden], ids [...] -> [..., width]."""
        return _Wire.apply(x, self.wire_dtype)

    def receive(self, z: Tensor, ids: Tensor) -> Tensor:
        """Inverse of `send` at the other end: [..., hidden]."""
        return z

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.receive(self.send(x, ids), ids)


class SubspaceLink(StageLink):
    """Sends the coordinates in the subspace of what the anchors do not explain.

    `projection`: for layers of any form, lossy where the stream leaves the subspace. `constrained`: for
    stages built of `SubspaceLinear` and `SubspaceEmbedding`, exact but for rounding; `check` measures it.
    """

    def __init__(
        self,
        space: Subspace,
        kind: Literal["projection", "constrained"] = "constrained",
        wire_dtype: torch.dtype = torch.float32,
        anchored: bool = True,
    ) -> None:
        super().__init__(space.hidden, wire_dtype)
        self.kind = kind
        self.anchored = anchored
        self.register_buffer("basis", space.basis.clone(), persistent=False)
        self.register_buffer("anchors", space.anchors.clone(), persistent=False)
        self.basis: Tensor
        self.anchors: Tensor

    @property
    def width(self) -> int:
        return self.basis.shape[1]

    def _anchor(self, ids: Tensor, dtype: torch.dtype) -> Tensor | float:
        return self.anchors[ids].to(dtype) if self.anchored else 0.0

    def send(self, x: Tensor, ids: Tensor) -> Tensor:
        return _Wire.apply((x - self._anchor(ids, x.dtype)) @ self.basis.to(x.dtype), self.wire_dtype)

    def receive(self, z: Tensor, ids: Tensor) -> Tensor:
        return z @ self.basis.to(z.dtype).t() + self._anchor(ids, z.dtype)

    @torch.no_grad()
    def check(self, x: Tensor, ids: Tensor) -> float:
        """Share of the norm of x that the link loses."""
        return float((self(x, ids) - x).norm() / x.norm())


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

    def __init__(self, space: Subspace) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(space.anchors.shape[0], space.rank))
        self.register_buffer("basis", space.basis.clone(), persistent=False)
        self.register_buffer("anchors", space.anchors.clone(), persistent=False)
        self.basis: Tensor
        self.anchors: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return self.anchors[ids] + self.weight[ids] @ self.basis.t()


def build_stage_links(
    kind: LinkKind,
    space: Subspace | None,
    slow: list[bool],
    *,
    hidden: int,
    wire_dtype: torch.dtype = torch.float32,
    anchored: bool = True,
) -> list[StageLink]:
    """A link for every boundary; only the slow ones are compressed."""
    if kind != "identity" and space is None:
        raise ConfigError("stage_link.rank", None, f"must be given for kind {kind}")
    return [
        SubspaceLink(space, kind, wire_dtype, anchored)
        if is_slow and kind != "identity" and space is not None
        else StageLink(hidden, wire_dtype)
        for is_slow in slow
    ]


@torch.no_grad()
def project_writers(weights: list[Tensor], space: Subspace) -> float:
    """Adaptation `project_writers`: after an outer step, W <- U U^T W on compressed replicas only.

    Exchanged pseudo-gradients are not in the subspace. Replicas with compressed links call this on their
    residual writers [hidden, in] *after* the outer state has copied theta to them; the global parameters stay
    unprojected, and what is discarded here must be part of the start from which the next pseudo-gradient is
    measured. Returns the discarded share of the norm.
    """
    lost = total = 0.0
    for weight in weights:
        basis = space.basis.to(weight)
        inside = basis @ (basis.t() @ weight)
        lost += float((weight - inside).square().sum())
        total += float(weight.square().sum())
        weight.copy_(inside)
    return (lost / total) ** 0.5 if total else 0.0


@torch.no_grad()
def absorb_embedding_drift(learned: Tensor, static: Tensor, space: Subspace) -> None:
    """Adaptation `absorb_embedding_drift`: what a sync pushed out of the subspace goes to the static table.

    learned, static: [vocab, hidden]; their sum is unchanged, afterwards the rows of `learned` lie in the
    subspace. Every stage must apply the same update to its copy of `static` before the next micro-batch
    (arXiv 2601.02360, equations 3 and 4).
    """
    basis = space.basis.to(learned)
    inside = (learned @ basis) @ basis.t()
    static.add_(learned - inside)
    learned.copy_(inside)
