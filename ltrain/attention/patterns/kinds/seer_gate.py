"""SeerAttention: a small gate that learns the block-pooled attention map while the model trains (arXiv
2410.13276).

The gate sees means, maxima and minima of the queries and keys of a block, after rotary embedding, projects
both to `gate_dim` for each key/value head, and scores block pairs by their product. It is distilled from
the attention that each block really gets; the loss reaches the gate alone, never q or k.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ltrain.attention.patterns.base import Capabilities, DynamicPattern, Selection, Shape, Widths
from ltrain.attention.patterns.documents import Documents
from ltrain.attention.patterns.exchange import Gather, Place, Steps, alone, run_alone
from ltrain.attention.patterns.pooling import forced_columns, in_blocks, keep_top_k, valid_tokens
from ltrain.attention.patterns.rows import from_bits, pack_bits
from ltrain.config.base import ConfigError
from ltrain.config.patterns import SeerGateFields


class BlockGate(nn.Module):
    """Scores of block pairs: [..., R, C] logits from features [R, B, Hkv, 3D] of queries and [C, B, Hkv,
    3D] of keys.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, gate_dim: int) -> None:
        super().__init__()
        shape = (num_kv_heads, 3 * head_dim, gate_dim)
        self.init_std = (3 * head_dim) ** -0.5
        self.query = nn.Parameter(torch.randn(shape) * self.init_std)
        self.key = nn.Parameter(torch.randn(shape) * self.init_std)

    def project(self, features: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("nbhf,hfg->bhng", features.to(weight.dtype), weight)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Logits [B, Hkv, R, C]."""
        a, b = self.project(queries, self.query), self.project(keys, self.key)
        return a @ b.transpose(-1, -2) * self.query.shape[-1] ** -0.5


class SeerGate(SeerGateFields, DynamicPattern):
    """Keeps the diagonal, the document's first blocks and the best others by the gate, `top_k` in all.

    Head axis Hkv. Two collectives: pooled features of the keys, then the rows' choices.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(True, True, True, "Hkv", collectives=2, learned=True)

    def make_module(self, *, num_heads: int, num_kv_heads: int, head_dim: int) -> BlockGate:
        return BlockGate(num_kv_heads, head_dim, self.gate_dim)

    def steps(
        self, q: Tensor, k: Tensor, shape: Shape, place: Place, module: nn.Module | None = None
    ) -> Steps:
        if not isinstance(module, BlockGate):
            raise ConfigError(
                "module", type(module).__name__, "must be the pattern's BlockGate", "use make_module"
            )
        docs = shape.documents
        keys = yield Gather(block_features(k, place, docs, keys=True), place.block_owner)
        queries = block_features(_mean_of_group(q, shape), place, docs, keys=False)
        # All keys are projected at once, by one product of the same shape on any number of ranks.
        projected = module.project(keys, module.key)
        batch, heads = projected.shape[:2]
        rows = torch.zeros(
            len(place.blocks), batch, heads, docs[0].num_blocks, dtype=torch.bool, device=q.device
        )
        for i, row in enumerate(place.blocks.tolist()):
            query = module.project(queries[i : i + 1], module.query)
            for b in range(batch):
                own = docs[b if len(docs) > 1 else 0]
                low = int(own.low[row])
                score = torch.bmm(query[b], projected[b, :, low : row + 1].transpose(1, 2)).squeeze(1)
                forced = [c - low for c in forced_columns(row, own, self.sink_blocks, 1)]
                rows[i, b, :, low : row + 1] = keep_top_k(score, forced, self.top_k)
        packed = yield Gather(pack_bits(rows.flatten(1, 2)), place.block_owner)
        return Selection(from_bits(packed, batch, heads, shape.block))

    def saved_bytes(self, widths: Widths, *, lean: bool) -> tuple[float, float]:
        """The gate's gradient; at `none` its graph: features, projected features and the two maps."""
        kv_size = widths.num_kv_heads * widths.head_dim
        if lean:
            return 0.0, widths.element * 6.0 * kv_size * self.gate_dim
        pooled = widths.element * (3 * kv_size + widths.num_kv_heads * self.gate_dim)
        maps = self.target_rows * (8 * widths.num_kv_heads + 1)
        return (pooled + maps) * widths.context / widths.block, float(self.target_rows * pooled)

    def lesson(self, q: Tensor, k: Tensor, shape: Shape, place: Place, step: int) -> Steps:
        rows = self.target_blocks(shape.documents[0].num_blocks, step)
        return self.distillation_steps(q, k, shape, place, rows)

    def target_blocks(self, num_blocks: int, step: int) -> np.ndarray:
        """Query blocks for the loss of `step`: `target_rows` spread over the sequence, shifted from step to
        step.
        """
        count = min(self.target_rows, num_blocks)
        return np.unique((np.arange(count) * num_blocks // max(count, 1) + step) % max(num_blocks, 1))

    def distillation_steps(self, q: Tensor, k: Tensor, shape: Shape, place: Place, rows: np.ndarray) -> Steps:
        """Search for the loss's constants: a `Distillation` of the query blocks `rows` (four collectives)."""
        q, k, docs = q.detach(), k.detach(), shape.documents
        batch = q.shape[0]
        keys = yield Gather(block_features(k, place, docs, keys=True), place.block_owner)
        mine = np.isin(place.blocks, rows)
        features = block_features(_mean_of_group(q, shape), place, docs, keys=False)[torch.from_numpy(mine)]
        local = torch.cat(
            [in_blocks(q, place)[:, torch.from_numpy(mine)].transpose(0, 1).flatten(1), features.flatten(1)],
            1,
        )
        whole = yield Gather(local, place.block_owner[rows])
        split = batch * shape.block * shape.num_heads * q.shape[-1]
        queries = whole[:, :split].view(len(rows), batch, shape.block, shape.num_kv_heads, -1, q.shape[-1])
        by_block = torch.stack(
            [
                _block_lse(queries[r, b], k, int(row), b, shape, place)
                for r, row in enumerate(rows)
                for b in range(batch)
            ]
        )
        own = (
            by_block.logsumexp(-1)
            if by_block.shape[-1]
            else by_block.new_full(by_block.shape[:-1], -torch.inf)
        )
        lse = (yield Gather(own[None], np.arange(place.world_size))).logsumexp(0)
        share = (by_block - lse[..., None]).exp().nan_to_num(0.0).sum((2, 3)).permute(2, 0, 1)
        share = yield Gather(share.contiguous(), place.block_owner)
        target = share.view(-1, len(rows), batch, shape.num_kv_heads).permute(2, 3, 1, 0)
        total = target.sum(-1, keepdim=True)
        seen = torch.stack([_seen(docs[b if len(docs) > 1 else 0], rows) for b in range(batch)]).to(q.device)
        # A copy: the loss's graph must not hold the queries beside them.
        query_features = whole[:, split:].clone().view(len(rows), batch, shape.num_kv_heads, -1)
        return Distillation(query_features, keys, target / total.clamp(min=1e-20), seen)

    def loss(self, module: BlockGate, constants: Distillation) -> Tensor:
        """KL(block-pooled attention || softmax of the gate), mean over rows and heads, times `loss_weight`.

        Equal on all ranks that share a sequence: average (don't sum) its gradient over them.
        """
        logits = module(constants.queries, constants.keys).float()
        hidden = ~constants.seen[:, None]
        log_gate = logits.masked_fill(hidden, -torch.inf).log_softmax(-1).masked_fill(hidden, 0)
        target = constants.target
        entropy = torch.special.xlogy(target, target)
        return self.loss_weight * (entropy - target * log_gate).sum(-1).mean()


class Distillation:
    """Constants of the loss.

    queries [R, B, Hkv, 3D] and keys [N, B, Hkv, 3D] are features, target [B, Hkv, R, N] sums to one along
    N, seen bool [B, R, N] marks the blocks that a row can see.
    """

    def __init__(self, queries: Tensor, keys: Tensor, target: Tensor, seen: Tensor) -> None:
        self.queries, self.keys, self.target, self.seen = queries, keys, target, seen


def block_features(x: Tensor, place: Place, documents: list[Documents], *, keys: bool) -> Tensor:
    """Mean, maximum and minimum over the block's tokens of one document, fp32 [n, B, H, 3D]."""
    valid = valid_tokens(documents, place.blocks, keys=keys).to(x.device)[..., None, None]
    cut = in_blocks(x, place).float()
    mean = (cut * valid).sum(2) / valid.sum(2).clamp(min=1)
    high = cut.masked_fill(~valid, -torch.inf).amax(2)
    low = cut.masked_fill(~valid, torch.inf).amin(2)
    return torch.cat([mean, high, low], dim=-1).transpose(0, 1).contiguous()


def _mean_of_group(q: Tensor, shape: Shape) -> Tensor:
    return q.unflatten(2, (shape.num_kv_heads, -1)).float().mean(3)


def _block_lse(queries: Tensor, k: Tensor, row: int, b: int, shape: Shape, place: Place) -> Tensor:
    """Log-sum-exp of each query's logits in each own block, fp32 [Hkv, G, block, n]; queries [block, Hkv,
    G, D].

    -inf where a query sees nothing of a block, and for tokens that are not of the row's first document.
    """
    docs = shape.documents[b if len(shape.documents) > 1 else 0]
    keys = in_blocks(k, place)[b]
    token = torch.from_numpy(place.blocks[:, None] * docs.block + np.arange(docs.block)).to(k.device)
    stop = int(docs.query_run[1][row])
    position = torch.arange(row * docs.block, (row + 1) * docs.block, device=k.device)
    seen = (token <= position[:, None, None]) & (token >= int(docs.starts[docs.of_first[row]]))
    seen &= (position < stop)[:, None, None]
    parts = []
    for head in range(shape.num_kv_heads):
        rows = queries[:, head].float().transpose(0, 1) * k.shape[-1] ** -0.5
        logits = torch.einsum("gmd,ncd->gmnc", rows, keys[:, :, head].float())
        parts.append(logits.masked_fill(~seen, -torch.inf).logsumexp(-1))
    return torch.stack(parts)


def _seen(docs: Documents, rows: np.ndarray) -> Tensor:
    column = np.arange(docs.num_blocks)
    return torch.from_numpy((column <= rows[:, None]) & (column >= docs.low[rows][:, None]))


@torch.no_grad()
def distillation(
    pattern: SeerGate, q: Tensor, k: Tensor, *, block: int, step: int = 0, doc_ids: Tensor | None = None
) -> Distillation:
    """The loss's constants on one process: q [B, T, Hq, D], k [B, T, Hkv, D], doc_ids int [T] or [B, T]."""
    shape = pattern.shape_of(
        num_tokens=q.shape[1], num_kv_heads=k.shape[2], num_heads=q.shape[2], block=block, doc_ids=doc_ids,
        device=q.device,
    )  # fmt: skip
    place = alone(q.shape[1], block)
    rows = pattern.target_blocks(shape.documents[0].num_blocks, step)
    return run_alone(pattern.distillation_steps(q, k, shape, place, rows))
