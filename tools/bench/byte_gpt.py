"""The small model of the sync studies: a byte-level GPT, its data, optimizer and pretrained start."""

from __future__ import annotations

import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltrain.parallel.stage_link import Subspace, SubspaceEmbedding, SubspaceLinear, project_writers

HIDDEN, LAYERS, HEADS, CONTEXT, VOCAB = 128, 2, 4, 64, 256


class Block(nn.Module):
    """Pre-norm; `space` makes its residual writers write into the subspace only."""

    def __init__(self, space: Subspace | None = None) -> None:
        super().__init__()

        def writer(inputs: int) -> nn.Module:
            return nn.Linear(inputs, HIDDEN, bias=False) if space is None else SubspaceLinear(inputs, space)

        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), writer(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), writer(4 * HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, HIDDEN))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Two stages of one layer; `link` stands on the boundary between them.

    With `space` the first stage is of reparametrised layers.
    """

    def __init__(self, space: Subspace | None = None) -> None:
        super().__init__()
        self.embedding = (
            nn.Embedding(VOCAB, HIDDEN) if space is None else SubspaceEmbedding(space, VOCAB, 0.02)
        )
        self.position = nn.Embedding(CONTEXT, HIDDEN)
        self.blocks = nn.ModuleList([Block(space if i < LAYERS // 2 else None) for i in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                writer = "out" in name or "down" in name
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * LAYERS) if writer else 1))

    def forward(self, ids: Tensor, link: Compressed | None = None) -> Tensor:
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        for i, block in enumerate(self.blocks):
            if i == LAYERS // 2 and link is not None:
                x = link(x, ids)
            x = block(x)
        return self.head(self.norm(x))


class Compressed:
    """The link of a replica that is a pipeline of two slow workers.

    What crosses is (x - anchor) U; the anchor is what the token and position tables have outside of the
    subspace when a round starts. `projected` keeps the first stage's writers and tables inside the subspace
    (adaptations `project_writers` and `absorb_embedding_drift`), so that nothing is lost on the way; without
    it the link drops what lies outside.
    """

    def __init__(self, space: Subspace, model: Model, projected: bool) -> None:
        self.basis, self.space, self.model, self.projected = space.basis, space, model, projected
        self.tables = [model.embedding.weight, model.position.weight]
        self.start_round()

    def _outside(self, x: Tensor) -> Tensor:
        return x - (x @ self.basis) @ self.basis.t()

    @torch.no_grad()
    def start_round(self) -> None:
        self.anchors = [self._outside(table) for table in self.tables]
        self.after_step()

    @torch.no_grad()
    def after_step(self) -> None:
        if not self.projected:
            return
        stage = self.model.blocks[: LAYERS // 2]
        project_writers([w.weight for block in stage for w in (block.out, block.down)], self.space)
        for table, anchor in zip(self.tables, self.anchors, strict=True):
            table.copy_(table - self._outside(table) + anchor)

    def __call__(self, x: Tensor, ids: Tensor) -> Tensor:
        anchor = self.anchors[0][ids] + self.anchors[1][: ids.shape[1]]
        return ((x - anchor) @ self.basis) @ self.basis.t() + anchor


class Corpus:
    """Bytes of the Python standard library; a step's sequences depend on seed, step and replica only."""

    def __init__(self, seed: int) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        text = b"".join(p.read_bytes() for p in sorted(root.glob("*.py")))
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        split = int(0.95 * len(data))
        self.train, self.held_out, self.seed = data[:split], data[split:], seed

    def batch(self, step: int, replica: int, sequences: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step * 101 + replica)
        at = torch.randint(len(self.train) - CONTEXT - 1, (sequences, 1), generator=generator)
        return self.train[at + torch.arange(CONTEXT + 1)].long()

    def test(self, sequences: int = 256) -> Tensor:
        at = torch.linspace(0, len(self.held_out) - CONTEXT - 2, sequences).long()[:, None]
        return self.held_out[at + torch.arange(CONTEXT + 1)].long()


def loss_of(model: Model, ids: Tensor, link: Compressed | None = None) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1], link).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Model, ids: Tensor, link: Compressed | None = None) -> float:
    return float(loss_of(model, ids, link))


def optimizer_of(model: Model, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, foreach=True)


def cosine_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 5 %, cosine to 10 %."""
    warm = min(1.0, (step + 1) / max(1, steps // 20))
    return peak * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def constant_rate(step: int, peak: float) -> float:
    """Warm-up over 10 steps, then constant: a time to a target must not depend on a planned end."""
    return peak * min(1.0, (step + 1) / 10)


def update(model: Model, optimizer: torch.optim.AdamW, lr: float) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


@dataclass(frozen=True)
class Pretraining:
    """The weights from which continued training starts: data parallelism on tokens of its own, by seed."""

    folder: Path
    steps: int = 1500
    lr: float = 4e-3

    def path(self, seed: int) -> Path:
        return self.folder / f"start-{seed}-{self.steps}-{self.lr:g}.pt"

    def run(self, seed: int) -> str:
        """Train and write the weights; returns a line for the log."""
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        model, corpus = Model(), Corpus(seed)
        optimizer = optimizer_of(model, self.lr)
        for step in range(self.steps):
            loss_of(model, corpus.batch(-1 - step, 0, 16)).backward()
            update(model, optimizer, cosine_rate(step, self.steps, self.lr))
        path = self.path(seed)
        torch.save(model.state_dict(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        return f"pretrained seed {seed}: {evaluate(model, corpus.test()):.4f}"

    def load(self, seed: int) -> Model:
        model = Model()
        model.load_state_dict(torch.load(self.path(seed), weights_only=True))
        return model
