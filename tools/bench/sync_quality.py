"""Quality of the synchronisation methods on a small model: curves and a table.

    python tools/bench/sync_quality.py [--seeds 3] [--steps 240] [--out docs/benchmarks/sync_quality.json]

A byte-level GPT is pretrained by data parallelism, then trained on by every method from the same weights, on
the same tokens: continued training is what the methods are for here. Replicas are simulated in one process
with the code of a run (`OuterState`); bytes are those of real payloads.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltrain.config.sync import DiLoCo, SparseLoCo
from ltrain.parallel.stage_link import StageLink, Subspace, SubspaceLink
from ltrain.sync.outer import OuterState

HIDDEN, LAYERS, HEADS, CONTEXT, VOCAB = 128, 2, 4, 64, 256


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(4 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, HIDDEN))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    """Two stages of one layer; `link` stands on the boundary between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(CONTEXT, HIDDEN)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(
                    p, std=0.02 / (math.sqrt(2 * LAYERS) if "out" in name or "down" in name else 1)
                )

    def forward(self, ids: Tensor, link: StageLink | None = None) -> Tensor:
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]
        for i, block in enumerate(self.blocks):
            if i == LAYERS // 2 and link is not None:
                x = link(x, ids)
            x = block(x)
        return self.head(self.norm(x))


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

    def test(self) -> Tensor:
        at = torch.linspace(0, len(self.held_out) - CONTEXT - 2, 128).long()[:, None]
        return self.held_out[at + torch.arange(CONTEXT + 1)].long()


def loss_of(model: Model, ids: Tensor, link: StageLink | None = None) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1], link).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Model, ids: Tensor) -> float:
    return float(loss_of(model, ids))


def optimizer_of(model: Model, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 5 %, cosine to 10 %."""
    warm = min(1.0, (step + 1) / max(1, steps // 20))
    return peak * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def update(model: Model, optimizer: torch.optim.AdamW, lr: float) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


@dataclass
class Method:
    """A row of the table: a name, the method (None: every-step data parallelism), and links by replica."""

    name: str
    config: DiLoCo | SparseLoCo | None
    compressed: tuple[int, ...] = ()
    curve: list[float] = field(default_factory=list)


def methods(h: int) -> list[Method]:
    def sparse(k: int, bits: int = 1, **more: object) -> SparseLoCo:
        fields = {"density": k / 4096, "bits": bits, "aggregation": "senders", "gain": 1.0} | more
        return SparseLoCo(steps_per_round=h, **fields)  # type: ignore[arg-type]

    return [
        Method("every step (data parallel)", None),
        Method("DiLoCo, gain 1 (momentum 0.5)", DiLoCo(steps_per_round=h, outer_momentum=0.5, gain=1.0)),
        Method("DiLoCo, published (0.7, 0.9)", DiLoCo(steps_per_round=h)),
        Method("SparseLoCo k=64, sign", sparse(64)),
        Method("SparseLoCo k=64, 2-bit table", sparse(64, 2)),
        Method("SparseLoCo k=256, sign", sparse(256)),
        Method("SparseLoCo k=64, sign, delayed update", sparse(64, overlap="delayed")),
        Method("mixed: stage links of half the replicas compressed", sparse(64), (2, 3)),
        Method("mixed: all stage links compressed", sparse(64), (0, 1, 2, 3)),
    ]


def train(method: Method, start: Model, corpus: Corpus, args: argparse.Namespace, space: Subspace) -> dict:
    models = [copy.deepcopy(start) for _ in range(args.replicas if method.config else 1)]
    optimizers = [optimizer_of(model, args.lr) for model in models]
    link = SubspaceLink(space, "projection", anchored=False)
    states = [OuterState(method.config, dict(m.named_parameters())) for m in models if method.config]
    test, curve, nbytes, flight = corpus.test(), [], 0, None
    entries = sum(p.numel() for p in start.parameters())
    for step in range(args.steps):
        lr = rate(step, args.steps, args.lr)
        if not states:
            ids = torch.cat([corpus.batch(step, r, args.sequences) for r in range(args.replicas)])
            loss_of(models[0], ids).backward()
            update(models[0], optimizers[0], lr)
            # What a ring all-reduce in bfloat16 sends from every replica.
            nbytes += round(2 * entries * 2 * (args.replicas - 1) / args.replicas)
        for r, model in enumerate(models if states else []):
            boundary = link if r in method.compressed else None
            loss_of(model, corpus.batch(step, r, args.sequences), boundary).backward()
            update(model, optimizers[r], lr)
        if states and (step + 1) % args.h == 0:
            if flight is not None:
                for state in states:
                    state.apply(flight)
            sent = {f"r{r}": state.contribute() for r, state in enumerate(states)}
            nbytes += sum(payload.nbytes for payload in sent["r0"].values()) * (args.replicas - 1)
            if states[0].delayed:
                flight = sent
            else:
                for state in states:
                    state.apply(sent)
                    state.reset_parameters()
        if (step + 1) % args.eval_every == 0:
            view = copy.deepcopy(models[0])
            if states:
                for name, p in view.named_parameters():
                    p.data.copy_(states[0].theta[name])
            curve.append(evaluate(view, test))
    if flight is not None:
        for state in states:
            state.apply(flight)
            state.reset_parameters()
        curve[-1] = evaluate(models[0], test)
    if states:
        assert len({state.digest() for state in states}) == 1
    return {"method": method.name, "curve": curve, "bytes_up": nbytes}


def pretrain(model: Model, corpus: Corpus, steps: int, lr: float) -> None:
    """Data parallelism on its own tokens, for the weights from which every method goes on."""
    optimizer = optimizer_of(model, lr)
    for step in range(steps):
        loss_of(model, corpus.batch(-1 - step, 0, 16)).backward()
        update(model, optimizer, rate(step, steps, lr))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pretrain", type=int, default=300)
    parser.add_argument("--h", type=int, default=5)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--pretrain-lr", type=float, default=4e-3)
    parser.add_argument("--eval-every", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16, help="of the stage links, of 128")
    parser.add_argument(
        "--start", default="", help="file for the pretrained weights, with {seed} in its name"
    )
    parser.add_argument("--only", default="", help="run the methods whose name contains this")
    parser.add_argument("--out", default="docs/benchmarks/sync_quality.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        began = time.perf_counter()
        torch.manual_seed(seed)
        corpus, start = Corpus(seed), Model()
        space = Subspace(HIDDEN, args.rank, VOCAB, 1234)
        saved = Path(args.start.format(seed=seed)) if args.start else None
        if saved is not None and saved.exists():
            start.load_state_dict(torch.load(saved, weights_only=True))
        else:
            pretrain(start, corpus, args.pretrain, args.pretrain_lr)
            if saved is not None:
                torch.save(start.state_dict(), saved)
        at_start = evaluate(start, corpus.test())
        print(f"seed {seed}: start {at_start:.4f} ({time.perf_counter() - began:.0f} s)", flush=True)
        for method in methods(args.h):
            if args.only not in method.name:
                continue
            began = time.perf_counter()
            row = train(method, start, corpus, args, space) | {"seed": seed, "start": at_start}
            rows.append(row)
            seconds = time.perf_counter() - began
            print(f"seed {seed}: {row['method']}: {row['curve'][-1]:.4f} ({seconds:.0f} s)", flush=True)
            Path(args.out).write_text(json.dumps({"arguments": vars(args), "rows": rows}))


if __name__ == "__main__":
    main()
