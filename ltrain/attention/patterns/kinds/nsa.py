"""Native sparse attention: compressed, selected and window branches, gated (arXiv 2502.11089, section 3).

Differences from the paper, so that it can start from a dense checkpoint and run in blocks: a block of
queries shares its selection; compressed keys don't overlap (they never straddle blocks, so a shard makes
them by itself) and are learned weighted means; gates come from the query, are `initial + tanh(q . w)` with
w zero at first, so that the default starts as the selected branch alone, which with `top_k` of all blocks
is dense attention.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ltrain.attention.patterns.base import Capabilities, DynamicPattern, LayerCall, Selection, Shape, Widths
from ltrain.attention.patterns.documents import Documents, documents_of
from ltrain.attention.patterns.exchange import Gather, Place, Steps, alone
from ltrain.attention.patterns.kinds.sliding_window import SlidingWindow
from ltrain.attention.patterns.pooling import forced_columns, in_blocks, keep_top_k, run_exists, valid_tokens
from ltrain.attention.patterns.rows import from_bits, pack_bits
from ltrain.attention.patterns.verticals import NEVER
from ltrain.config.base import ConfigError
from ltrain.config.patterns import NsaFields
from ltrain_kernels.block_sparse import BlockIndex, block_sparse_attention


class Nsa(NsaFields, DynamicPattern):
    """Selects the diagonal, nearest and first blocks and the best others by attention to the compressed
    keys.

    Importance is the softmax over compressed keys of earlier blocks, summed over the row's queries, the
    heads of the group and the block's compressed keys (paper, equations 8-10). Head axis Hkv. Two
    collectives: compressed keys, then the rows' choices. `NsaBranches` computes the attention.
    """

    capabilities: ClassVar[Capabilities] = Capabilities(True, True, True, "Hkv", collectives=2, learned=True)

    def make_module(self, *, num_heads: int, num_kv_heads: int, head_dim: int) -> NsaBranches:
        return NsaBranches(self, num_heads, num_kv_heads, head_dim)

    def branches(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, call: LayerCall
    ) -> tuple[Tensor, ...]:
        assert isinstance(module, NsaBranches)
        return module.branches(q, k, v, index, call)

    def combine(self, *branches: Tensor) -> Tensor:
        far, selected, near, gates = branches
        g_far, g_selected, g_near = gates.unsqueeze(-1).unbind(-2)
        return g_far * far + g_selected * selected + g_near * near

    def saved_bytes(self, widths: Widths, *, lean: bool) -> tuple[float, float]:
        """Two more outputs and LSEs, the gates, and on several ranks all compressed keys and values.

        At `none` also: the output beside its branches, tanh, the compressed keys and values on one rank too,
        and what makes them: keys and values in fp32 unless they are so, shares and their sums.
        """
        heads, kv_heads, dim = widths.num_heads, widths.num_kv_heads, widths.head_dim
        token = widths.element * (2 * heads * dim + 3 * heads) + 8 * heads
        fetched = widths.element * 2 * kv_heads * dim * widths.context / self.compress
        if lean:
            return token + (fetched if widths.context > 1 else 0), 0.0
        token += fetched + widths.element * (heads * dim + 3 * heads)
        token += 0 if widths.element == 4 else 8 * kv_heads * dim
        token += 2 * (1 + 8 * kv_heads + 8 * kv_heads / self.compress)
        return token, 8.0 * kv_heads * self.compress

    def steps(
        self, q: Tensor, k: Tensor, shape: Shape, place: Place, module: nn.Module | None = None
    ) -> Steps:
        if not isinstance(module, NsaBranches):
            raise ConfigError(
                "module", type(module).__name__, "must be the pattern's NsaBranches", "use make_module"
            )
        if shape.block % self.compress:
            raise ConfigError(
                "attention.pattern.compress", self.compress, f"must divide the block of {shape.block} tokens"
            )
        docs = shape.documents
        keys = module.compressed(k, module.key_weight, place, docs).detach()
        keys = yield Gather(keys.transpose(0, 1).contiguous(), place.block_owner)
        exists = run_exists(docs, self.compress, keys=True).to(q.device)
        group = shape.num_heads // shape.num_kv_heads
        queries = in_blocks(q, place).float() * q.shape[-1] ** -0.5
        valid = valid_tokens(docs, place.blocks, keys=False).to(q.device)
        batch, heads = q.shape[0], shape.num_kv_heads
        rows = torch.zeros(
            len(place.blocks), batch, heads, docs[0].num_blocks, dtype=torch.bool, device=q.device
        )
        for i, row in enumerate(place.blocks.tolist()):
            for b in range(batch):
                own = docs[b if len(docs) > 1 else 0]
                low = int(own.low[row])
                asked = queries[b, i].unflatten(1, (heads, group)).permute(1, 2, 0, 3).flatten(1, 2)
                counted = valid[b if len(valid) > 1 else 0, i].repeat(group)
                score = importance(
                    asked, counted, keys[low:row, b], exists[low:row, b if len(docs) > 1 else 0]
                )
                forced = [c - low for c in forced_columns(row, own, self.sink_blocks, self.local_blocks)]
                rows[i, b, :, low : row + 1] = keep_top_k(score, forced, self.top_k)
        packed = yield Gather(pack_bits(rows.flatten(1, 2)), place.block_owner)
        return Selection(from_bits(packed, batch, heads, shape.block))


def importance(queries: Tensor, counted: Tensor, keys: Tensor, exists: Tensor) -> Tensor:
    """Attention that queries pay to each block, [Hkv, C + 1] (the diagonal last, 0).

    Scaled queries [Hkv, M, D], counted [M], keys [C, runs, Hkv, D], exists [C, runs].
    """
    blocks, runs, heads, _ = keys.shape
    logits = torch.bmm(queries, keys.float().permute(2, 3, 0, 1).flatten(2))
    logits = logits.masked_fill(~exists.flatten(), -torch.inf)
    share = logits.softmax(-1).nan_to_num(0.0) * counted[:, None]
    return torch.nn.functional.pad(share.sum(1).view(heads, blocks, runs).sum(-1), (0, 1))


class NsaBranches(nn.Module):
    """The three branches of one layer and their gates."""

    def __init__(self, pattern: Nsa, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.pattern = pattern
        self.init_std = 0.0
        self.key_weight = nn.Parameter(torch.zeros(num_kv_heads, pattern.compress))
        self.value_weight = nn.Parameter(torch.zeros(num_kv_heads, pattern.compress))
        self.gate_weight = nn.Parameter(torch.zeros(num_heads, head_dim, 3))

    def compressed(self, x: Tensor, weight: Tensor, place: Place, documents: list[Documents]) -> Tensor:
        """Weighted means over runs of `compress` tokens of a block's last document: [B, n, runs, Hkv, D],
        x's dtype.
        """
        run = self.pattern.compress
        runs = place.block // run
        valid = valid_tokens(documents, place.blocks, keys=True).to(x.device).unflatten(2, (runs, run))
        share = weight.float().softmax(-1).T * valid[..., None]
        share = share / share.sum(3, keepdim=True).clamp(min=1e-20)
        cut = in_blocks(x, place).unflatten(2, (runs, run)).float()
        return (cut * share[..., None]).sum(3).to(x.dtype)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: BlockIndex,
        *,
        doc_ids: Tensor | None = None,
        call: LayerCall | None = None,
    ) -> Tensor:
        """Gated sum of the branches, [B, T_local, Hq, Dv].

        q [B, T_local, Hq, D], k and v [B, T_local, Hkv, .]: the tokens of `call.place` (without `call` the
        whole sequence, with documents `doc_ids`). `index` is the selection over the whole sequence.
        """
        call = call or whole_call(q.shape[1], index.block_q, doc_ids)
        return self.pattern.combine(*self.branches(q, k, v, index, call))

    def branches(
        self, q: Tensor, k: Tensor, v: Tensor, index: BlockIndex, call: LayerCall
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compressed, selected and window branch [B, T_local, Hq, Dv]; their gates [B, T_local, Hq, 3]."""
        block = index.block_q
        place, num_tokens, doc_ids = call.place, call.num_tokens, call.doc_ids
        documents = documents_of(doc_ids, num_tokens, block)
        window, far_index, position, query_doc, key_pos, key_doc = call.cached(
            "nsa", lambda: self._shared(q, k, block, documents, call)
        )
        selected, near = call.attend(q, k, v, index), call.attend(q, k, v, window)
        keys, values = call.gather(
            self.compressed(k, self.key_weight, place, documents),
            self.compressed(v, self.value_weight, place, documents),
        )
        far = call.attend_here(
            q, keys.flatten(1, 2), values.flatten(1, 2), far_index, q_pos=position, k_pos=key_pos,
            q_doc=query_doc, k_doc=key_doc, window=call.window, scale=call.scale,
        )  # fmt: skip
        return far, selected, near, self.gates(q)

    def gates(self, q: Tensor) -> Tensor:
        """Of the compressed, selected and window branch, [B, T, Hq, 3], from q [B, T, Hq, D]."""
        learned = torch.einsum("bthd,hdg->bthg", q, self.gate_weight.to(q.dtype)).tanh()
        return q.new_tensor(self.pattern.initial_gates) + learned

    def _shared(
        self, q: Tensor, k: Tensor, block: int, documents: list[Documents], call: LayerCall
    ) -> tuple[BlockIndex, BlockIndex, Tensor, Tensor | None, Tensor, Tensor | None]:
        """What does not depend on the layer: indices of the window and compressed branches, and positions and
        documents of own tokens and of all compressed keys.
        """
        window = SlidingWindow(window=self.pattern.window).index(
            num_tokens=call.num_tokens,
            num_kv_heads=k.shape[2],
            num_heads=q.shape[2],
            block=block,
            doc_ids=call.doc_ids,
            device=q.device,
        )
        far = self._compressed_index(call.place, call.num_tokens, q.device)
        position, query_doc = _own_tokens(call.place, call.num_tokens, call.doc_ids, q.device)
        return window, far, position, query_doc, *self._compressed_tokens(documents, call.doc_ids, q.device)

    def _compressed_tokens(
        self, documents: list[Documents], doc_ids: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Position (its last token; after everything where the run is empty) and document of every
        compressed key.
        """
        docs, run = documents[0], self.pattern.compress
        blocks = np.arange(docs.num_blocks)
        runs = run_exists(documents, run, keys=True).transpose(0, 1).flatten(1)
        last = torch.arange(1, runs.shape[1] + 1) * run - 1
        position = torch.where(runs, last, NEVER).to(device, torch.int32)
        if doc_ids is None:
            return position[0], None
        end = torch.from_numpy(np.minimum((blocks + 1) * docs.block, docs.num_tokens) - 1).to(doc_ids.device)
        key_doc = doc_ids.index_select(-1, end).repeat_interleave(docs.block // run, dim=-1).to(device)
        return (position[0] if doc_ids.dim() == 1 else position), key_doc

    def _compressed_index(self, place: Place, num_tokens: int, device: torch.device) -> BlockIndex:
        """Own query blocks by blocks of compressed keys that hold one in the past."""
        num_keys = len(place.block_owner) * place.block // self.pattern.compress
        columns = -(-num_keys // place.block)
        first_end = (np.arange(columns) * place.block + 1) * self.pattern.compress - 1
        last_query = np.minimum((place.blocks + 1) * place.block, num_tokens) - 1
        mask = torch.from_numpy(first_end[None] <= last_query[:, None]).to(device)
        return BlockIndex.from_mask(mask[None, None], place.block, place.block)


def _own_tokens(
    place: Place, num_tokens: int, doc_ids: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    token = (place.blocks[:, None] * place.block + np.arange(place.block)).reshape(-1)
    position = torch.from_numpy(token[token < num_tokens]).to(device)
    docs = None if doc_ids is None else doc_ids.to(device).index_select(-1, position)
    return position.to(torch.int32), docs


def whole_call(
    num_tokens: int,
    block: int,
    doc_ids: Tensor | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> LayerCall:
    """The call of a process that holds the whole sequence."""

    def attend(q: Tensor, k: Tensor, v: Tensor, index: BlockIndex) -> Tensor:
        position, docs = _own_tokens(alone(num_tokens, block), num_tokens, doc_ids, q.device)
        where = {"q_pos": position, "k_pos": position, "q_doc": docs, "k_doc": docs}
        return block_sparse_attention(q, k, v, index, **where, window=window, scale=scale)[0]

    return LayerCall(
        num_tokens=num_tokens,
        doc_ids=doc_ids,
        place=alone(num_tokens, block),
        attend=attend,
        gather=lambda x, y: (x, y),
        cached=lambda key, make: make(),
        window=window,
        scale=scale,
    )
