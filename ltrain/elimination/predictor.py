"""The learned predictor of the `lemo` score: two low-rank networks a layer, of elastic size (arXiv
2501.09767).

n blocks of `block` tokens, E hidden size, H heads of the model, P = block * E / H inputs of a head. The
hidden states of a block are cut into H slices of features; every head's slice passes through the same two
networks, P -> hidden -> inner -> rank with ReLU between, one for the block as query and one as key. The
predicted importance of a pair of blocks is the mean over heads of the two vectors' product.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ltrain.config.base import ConfigError
from ltrain.elimination.inputs import LayerInputs

FIELD = "elimination.scorer.path"
FACTS, WEIGHTS = "predictor.json", "predictor.safetensors"
_FORMAT = "ltrain elimination predictor 1"
# Blocks that pass through the networks at a time.
_CHUNK = 64


@dataclass(frozen=True)
class PredictorShape:
    """What a predictor is built for, and its sizes before any pruning."""

    num_layers: int
    hidden_size: int
    num_heads: int
    block: int
    hidden: int = 128
    inner: int = 1024
    rank: int = 64

    @property
    def inputs(self) -> int:
        return self.block * self.hidden_size // self.num_heads


class ElasticNetwork(nn.Module):
    """inputs -> hidden -> inner -> rank without biases; counts how often each hidden neuron gives zero."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(b, a) * (2 / a) ** 0.5) for a, b in pairwise(sizes)
        )
        self.zeros = [torch.zeros(size) for size in sizes[1:-1]]
        self.seen = 0

    @property
    def sizes(self) -> list[int]:
        return [self.weights[0].shape[1], *(w.shape[0] for w in self.weights)]

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.weights) - 1
        for i, weight in enumerate(self.weights):
            x = F.linear(x, weight)
            if i < last:
                if self.training:
                    self.zeros[i] += (x.detach() <= 0).flatten(0, -2).sum(0).cpu()
                x = x.relu()
        if self.training:
            self.seen += x[..., 0].numel()
        return x

    @torch.no_grad()
    def prune(self, frequency: float) -> int:
        """Remove hidden neurons that gave zero in at least `frequency` of what was seen since the last call.

        A layer never loses all of its neurons. Parameters are new objects afterwards: optimizers of the old
        ones must be rebuilt. Returns how many neurons were removed.
        """
        removed = 0
        for i, zeros in enumerate(self.zeros):
            kept = (zeros < frequency * max(self.seen, 1)).nonzero()[:, 0]
            if 0 < len(kept) < len(zeros):
                removed += len(zeros) - len(kept)
                kept = kept.to(self.weights[i].device)
                self.weights[i] = nn.Parameter(self.weights[i][kept].clone())
                self.weights[i + 1] = nn.Parameter(self.weights[i + 1][:, kept].clone())
            self.zeros[i] = torch.zeros(self.weights[i].shape[0])
        self.seen = 0
        return removed


class LayerPredictor(nn.Module):
    """The two networks of one layer."""

    def __init__(self, shape: PredictorShape) -> None:
        super().__init__()
        self.shape = shape
        sizes = (shape.inputs, shape.hidden, shape.inner, shape.rank)
        self.query, self.key = ElasticNetwork(sizes), ElasticNetwork(sizes)

    def forward(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """(queries, keys) [n, H, rank] of normed hidden states [n, block, E]."""
        heads = self.shape.num_heads
        x = blocks.unflatten(2, (heads, -1)).transpose(1, 2).flatten(2)
        return self.query(x), self.key(x)

    def pairs(self, blocks: Tensor) -> Tensor:
        """Predicted importance of every pair, [n, n]."""
        q, k = self(blocks)
        return torch.einsum("mhr,nhr->mn", q, k) / self.shape.num_heads

    def prune(self, frequency: float) -> int:
        return self.query.prune(frequency) + self.key.prune(frequency)


def token_blocks(inputs: LayerInputs) -> Tensor:
    """Normed hidden states of this rank's blocks, fp32 [own blocks, block, E]; zeros after a short one."""
    block = inputs.sequence.block
    rows = inputs.norm(inputs.x[:, 0]).float()
    return F.pad(rows, (0, 0, 0, -len(rows) % block)).unflatten(0, (-1, block))


class Predicted:
    """The scorer: predicted column sums inside each document, the same on every rank."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers.requires_grad_(False).eval()

    @torch.no_grad()
    def score(self, inputs: LayerInputs) -> Tensor:
        layer = self.layers[inputs.layer].to(inputs.x.device)
        blocks = token_blocks(inputs)
        parts = [torch.cat(layer(part), dim=-1) for part in blocks.split(_CHUNK)]
        rank = layer.shape.rank
        own = torch.cat(parts) if parts else blocks.new_zeros(0, layer.shape.num_heads, 2 * rank)
        q, k = inputs.gather(own).split(rank, dim=-1)
        # The column sum over a document's rows is the product with the sum of its queries. Documents are runs
        # of blocks, each summed by itself: no atomics, and one operation a document.
        _, runs = np.unique(inputs.sequence.documents.of_last, return_counts=True)
        columns = zip(q.split(runs.tolist()), k.split(runs.tolist()), strict=True)
        return torch.cat([q.new_zeros(0), *((rows.sum(0) * keys).sum((1, 2)) for rows, keys in columns)])


def new_predictor(shape: PredictorShape) -> nn.ModuleList:
    return nn.ModuleList(LayerPredictor(shape) for _ in range(shape.num_layers))


def save_predictor(
    layers: nn.ModuleList, shape: PredictorShape, folder: Path, *, fingerprint: str, facts: dict[str, Any]
) -> None:
    """Write the networks and what they belong to."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in layers.named_parameters()}
    save_file(tensors, folder / WEIGHTS)
    sizes = [[layer.query.sizes, layer.key.sizes] for layer in layers]
    found = {"format": _FORMAT, "fingerprint": fingerprint, "shape": asdict(shape), "sizes": sizes, **facts}
    (folder / FACTS).write_text(json.dumps(found, indent=1) + "\n")


def check_predictor(
    folder: Path, *, fingerprint: str, block: int, num_layers: int
) -> tuple[PredictorShape, list[list[list[int]]]]:
    """Shape and pruned sizes of a predictor's folder. Raises ConfigError unless it fits model and block."""
    try:
        found = json.loads((folder / FACTS).read_text())
        shape = PredictorShape(**found["shape"])
        sizes = found["sizes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "make it with ltrain fit-predictor"
        raise ConfigError(FIELD, str(folder), f"is not a predictor: {error}", fix) from None
    if found.get("format") != _FORMAT:
        raise ConfigError(FIELD, str(folder), f"is of format {found.get('format')!r}, not {_FORMAT!r}")
    if found.get("fingerprint") != fingerprint or shape.num_layers != num_layers:
        fix = "fit one for this model with ltrain fit-predictor"
        raise ConfigError(FIELD, str(folder), "was fitted to another model", fix)
    if shape.block != block:
        rule = f"was fitted to blocks of {shape.block} tokens, and the run's have {block}"
        raise ConfigError(FIELD, str(folder), rule, f"set elimination.block to {shape.block}")
    return shape, sizes


def load_predictor(folder: Path, *, fingerprint: str, block: int, num_layers: int) -> Predicted:
    """The scorer of a predictor's folder. Raises ConfigError as `check_predictor`, and on broken weights."""
    shape, sizes = check_predictor(folder, fingerprint=fingerprint, block=block, num_layers=num_layers)
    layers = new_predictor(shape)
    for layer, pair in zip(layers, sizes, strict=True):
        layer.query, layer.key = (ElasticNetwork(tuple(s)) for s in pair)
    try:
        layers.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(FIELD, str(folder), f"has weights that cannot be read: {reason}") from None
    return Predicted(layers)
