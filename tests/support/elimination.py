"""A layer with token elimination, and the definition that it must equal: dense attention with masks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from ltrain.attention import patterns
from ltrain.attention.context import AttentionContext
from ltrain.attention.module import AttentionSettings, CoreAttention
from ltrain.attention.rope import apply_rope
from ltrain.config.elimination import BlockElimination
from ltrain.elimination.runtime import Elimination
from ltrain.model.build import build_model
from ltrain.model.families import read_spec
from ltrain.parallel.layout import SequenceLayout
from ltrain.parallel.seam import cpu_seam
from support.models import save_tiny

BLOCK = 8

# Patterns that are found online, and sequences of documents for them.
FOUND = {
    "vertical_slash": patterns.vertical_slash(
        observed=8, window=8, sinks=1, max_verticals=2, max_slashes=1, vertical_p=0.5, slash_p=0.4,
        dense_below=0,
    ),
    "block_topk": patterns.block_topk(top_k=2, sink_blocks=0),
    "block_topk by query head": patterns.block_topk(top_k=2, sink_blocks=0, heads="query"),
    "xattention": patterns.xattention(stride=4, pool=2, threshold=0.2),
}  # fmt: skip
DOCUMENTS = {
    "one": (torch.zeros(96, dtype=torch.int32), 96),
    # Borders inside of blocks, a document within a block, a short last block.
    "packed": (torch.repeat_interleave(torch.arange(4), torch.tensor([45, 3, 30, 15])), 93),
    "padded": (torch.repeat_interleave(torch.tensor([0, 1, -1]), torch.tensor([51, 29, 16])), 96),
}


class Given:
    """A scorer that gives what it is told."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores

    def score(self, inputs: Any) -> Tensor:
        return self.scores


def make_elimination(scores: Tensor | None = None, scorer: Any = None, **fields: Any) -> Elimination:
    config = BlockElimination(**{"strata": 2, "sink_blocks": 0, "local_blocks": 0, "ratio": 0.5} | fields)
    ratio = config.ratio
    ratios = ratio if isinstance(ratio, tuple) else (ratio, ratio)
    return Elimination(config, ratios, scorer or Given(scores), block=config.block or BLOCK, steps=10, seed=7)


def make_model(folder: Any, mesh: Any, elimination: Elimination | None, *, variant: str = "llama",
               pattern: Any = None, **arguments: Any) -> Any:  # fmt: skip
    """A random model in fp64, the same for the same variant."""
    with cpu_seam():
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    if not folder.exists():
        save_tiny(folder, variant)
    spec = read_spec(folder)
    settings = AttentionSettings(
        rope=spec.rope, windows=spec.windows, pattern=pattern or patterns.dense(),
        total_kv_heads=spec.num_kv_heads, schedule="ring",
    )  # fmt: skip
    model = build_model(
        spec, core_attention=partial(CoreAttention, settings=settings), elimination=elimination, **arguments
    )
    make = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=make) * 0.2 + (p.dim() == 1))
    return model.double()


def make_context(
    num_tokens: int, doc_ids: Tensor | None = None, block: int = BLOCK, mesh: Any = None
) -> AttentionContext:
    """The whole sequence, or this rank's shard of it where a mesh is given."""
    docs = torch.zeros(num_tokens, dtype=torch.int32) if doc_ids is None else doc_ids.to(torch.int32)
    starts = torch.zeros(num_tokens, dtype=torch.int64)
    new = torch.cat([torch.ones(1, dtype=torch.bool), docs[1:] != docs[:-1]])
    starts[new] = new.nonzero()[:, 0]
    positions = torch.arange(num_tokens) - starts.cummax(0).values
    size, rank, group = (
        (1, 0, None) if mesh is None else (mesh.context.size, mesh.context.rank, mesh.context.group)
    )
    layout = SequenceLayout("striped", num_tokens, size, block)
    return AttentionContext(
        qkv_format="sbhd", layout=layout, group=group, rank=rank,
        rope_positions=layout.shard(positions.to(torch.int32), rank, 0), doc_ids=docs, key=11,
    )  # fmt: skip


def visible(context: AttentionContext, window: int | None = None) -> Tensor:
    docs = context.doc_ids
    at = torch.arange(len(docs))
    seen = (docs[:, None] == docs[None]) & (at[:, None] >= at[None])
    return seen if window is None else seen & (at[:, None] - at[None] < window)


def definition(layer: TransformerLayer, x: Tensor, context: AttentionContext, kept: Tensor, mode: str,
               mask: Tensor | None = None) -> Tensor:  # fmt: skip
    """The layer's output by dense attention: keys of dropped tokens masked, their outputs zeroed.

    kept: bool [T]. mask: bool [T, T] of visible pairs (default: causal inside documents).
    """
    attention = layer.self_attention
    seen = visible(context) if mask is None else mask
    tables = attention.core_attention.settings.rope.tables(context.rope_positions)
    q, k, v = attention.get_query_key_value_tensors(layer.input_layernorm(x))
    q, k = (apply_rope(t.transpose(0, 1), *tables)[0] for t in (q, k))
    v = v[:, 0]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    if mode in ("qkv", "layer"):
        seen = seen & kept[None]
    if mode == "backward":
        full = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out = torch.einsum("hij,jhd->ihd", full, v)
        # Softmax's gradient, p (dv - delta), for kept pairs; a constant for all others.
        pair = (seen & kept[None] & kept[:, None]) * full.detach()
        moved = torch.einsum("hij,jhd->ihd", pair, v) + torch.einsum(
            "hij,hij,ijhd->ihd", pair, scores - scores.detach(), (v[None] - out[:, None]).detach()
        )
        out = torch.where(kept[:, None, None], out.detach() + moved - moved.detach(), out.detach())
    else:
        weight = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        out = torch.einsum("hij,jhd->ihd", weight, v)
    y, bias = attention.linear_proj(out.flatten(1).unsqueeze(1))
    y = y if bias is None else y + bias
    row = kept[:, None, None]
    if mode == "backward":
        y = torch.where(row, y, y.detach())
        x2 = x + y
    else:
        x2 = x + torch.where(row, y, torch.zeros_like(y))
    z = layer._forward_mlp(x2)
    return torch.where(row, z, x) if mode == "layer" else z


def token_mask(blocks: Tensor, num_tokens: int, block: int = BLOCK) -> Tensor:
    kept = torch.zeros(-(-num_tokens // block), dtype=torch.bool)
    kept[blocks] = True
    return kept.repeat_interleave(block)[:num_tokens]


def gradients(layer, out, x, upstream):
    layer.zero_grad()
    out.backward(upstream)
    found = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return found | {"x": x.grad.clone()}


def compare(layer, context, kept, mode, num_tokens, mask=None):
    """The layer against `definition` in fp64: output and all gradients."""
    make = torch.Generator().manual_seed(8)
    x0 = torch.randn(num_tokens, 1, 32, generator=make, dtype=torch.float64)
    upstream = torch.randn(x0.shape, generator=make, dtype=torch.float64)
    x = x0.clone().requires_grad_()
    out, _ = layer(x, packed_seq_params=context)
    ours = gradients(layer, out, x, upstream)
    y = x0.clone().requires_grad_()
    expected = definition(layer, y, context, kept, mode, mask)
    theirs = gradients(layer, expected, y, upstream)
    assert (out - expected).abs().max() <= 1e-9
    assert ours.keys() == theirs.keys()
    for name in ours:
        error = (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1e-6)
        assert error <= 1e-8, (name, float(error))
    return x0, out.detach(), ours, upstream
