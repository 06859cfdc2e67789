"""The `core_attention` that replaces mcore's: RoPE from explicit positions, a pattern, an exchange, one
kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ltrain.attention.context import AttentionContext
from ltrain.attention.context_parallel import context_parallel_attention, plan_attention
from ltrain.attention.learned import Tape, learned_branches, mark_heads, own_loss, with_loss
from ltrain.attention.patterns import Pattern
from ltrain.attention.patterns.rows import only_rows
from ltrain.attention.profile import Profile
from ltrain.attention.rope import Rope, apply_rope
from ltrain.attention.schedules.engine import Schedule
from ltrain.attention.schedules.verticals import Tiles
from ltrain.attention.select import select_distributed
from ltrain.parallel.collectives import timed
from ltrain_kernels.block_sparse import BlockIndex

# T tokens, B batch, N query heads, K kv heads, D head dim, all of this rank.


@dataclass(frozen=True)
class AttentionSettings:
    """What every layer's attention shares. `windows` holds the model's own sliding window, or None, for each
    layer; `tensor_rank` and `total_kv_heads` make the heads' numbers global under tensor parallelism.
    """

    rope: Rope
    windows: tuple[int | None, ...]
    pattern: Pattern
    total_kv_heads: int
    schedule: str = "auto"
    tensor_rank: int = 0
    profile: Profile | None = None


@dataclass(frozen=True)
class Decisions:
    """What a call of attention decided: blocks, single keys beside them, and the planned exchange of each
    branch.

    A recomputation in the backward pass takes them as they are: nothing is selected or planned twice.
    """

    index: BlockIndex
    verticals: Tiles | None
    plans: tuple[Schedule, ...]


@dataclass(frozen=True)
class Attended:
    """Attention of one call. Its output is `CoreAttention.combine(branches)`.

    `saved` are the tensors that, with the decisions, serve the backward pass in the place of computing
    attention again; the branches are among them, as far as attention computed them. `loss` is the pattern's
    own loss, if it has one, and the weight of its gradient.
    """

    branches: tuple[Tensor, ...]
    saved: tuple[Tensor, ...]
    decisions: Decisions
    loss: tuple[Tensor, float] | None = None


class CoreAttention(nn.Module):
    """Attention of one layer over the sequence that `packed_seq_params`, an `AttentionContext`, describes.

    Takes q [T, B, N, D] and k, v [T, B, K, D] in the layout's order and returns [T, B, N * D]. Selection is a
    constant: no gradient passes through it. `learned` is the pattern's own part of the layer, sharded by head
    like the projections, or None.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        settings: AttentionSettings,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.layer = layer_number - 1
        self.settings = settings
        self.scale = softmax_scale
        self.learned: nn.Module | None = None
        if not settings.pattern.is_dense_layer(self.layer, len(settings.windows)):
            shards = config.tensor_model_parallel_size
            module = settings.pattern.make_module(
                num_heads=config.num_attention_heads // shards,
                num_kv_heads=settings.total_kv_heads // shards,
                head_dim=config.kv_channels,
            )
            self.learned = None if module is None else mark_heads(module, config.params_dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: AttentionContext | None = None,
    ) -> Tensor:
        context = packed_seq_params
        assert context is not None
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        done = self.attend(q, k, v, context, learn=torch.is_grad_enabled())
        out = self.combine(done.branches)
        if done.loss is not None:
            out = with_loss(out, *done.loss)
        return out.transpose(0, 1).flatten(2)

    def combine(self, branches: tuple[Tensor, ...]) -> Tensor:
        """Attention's output [B, T, N, D] from its branches."""
        return branches[0] if self.learned is None else self.settings.pattern.combine(*branches)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: AttentionContext,
        *,
        decisions: Decisions | None = None,
        saved: tuple[Tensor, ...] | None = None,
        learn: bool = False,
    ) -> Attended:
        """Attention of q [B, T, N, D] and k, v [B, T, K, D] before rotary embedding.

        With the `decisions` and what was `saved` of an earlier call on equal inputs, nothing is computed but
        the rotary embedding and what a learned pattern puts around attention, and no rank is asked anything:
        the result serves the backward pass. `learn`: a learned pattern in training computes its own loss.
        """
        if self.learned is not None:
            return self._attend_learned(q, k, v, context, decisions, saved, learn)
        rows = context.real_rows
        if rows is None:
            return self._attend(q, k, v, context, decisions, saved)
        # Rows that stand for no token go around attention and come out as zeros.
        shape = q.shape
        q, k, v = (x.index_select(1, rows) for x in (q, k, v))
        if saved is not None:
            saved = (saved[0].index_select(1, rows), saved[1].index_select(2, rows))
        done = self._attend(q, k, v, context, decisions, saved)
        out, lse = done.saved
        out = out.new_zeros(*shape[:3], out.shape[3]).index_copy(1, rows, out)
        lse = lse.new_zeros(shape[0], shape[2], shape[1]).index_copy(2, rows, lse)
        return Attended((out,), (out, lse), done.decisions)

    def _rotated(self, q: Tensor, k: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary_tables(context, q.device)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)

    def rotary_tables(self, context: AttentionContext, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of this rank's tokens, shared by the layers. An excerpt is its layer's own: its tables
        are gathered whenever they are needed, and not kept until the backward pass."""
        excerpt = context.excerpt
        if excerpt is not None:
            cos, sin = (x.index_select(0, excerpt.rows) for x in excerpt.tables)
            return cos, sin
        if context.rope_tables is None:
            assert context.rope_positions is not None
            context.rope_tables = self.settings.rope.tables(context.rope_positions, device=device)
        return context.rope_tables

    def _shared(self, context: AttentionContext) -> dict[str, Any]:
        """What planning and attending are both told of the sequence."""
        return {
            "layout": context.layout,
            "group": context.group,
            "doc_ids": context.doc_ids,
            "window": self.settings.windows[self.layer],
            "token_ids": None if context.excerpt is None else context.excerpt.token_ids,
            "node_size": context.node_size,
        }

    def _exchange(self, context: AttentionContext) -> dict[str, Any]:
        return {
            "schedule": context.schedule or self.settings.schedule,
            "profile": self.settings.profile,
        }

    def _attend_learned(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: AttentionContext,
        decisions: Decisions | None,
        saved: tuple[Tensor, ...] | None,
        learn: bool,
    ) -> Attended:
        pattern, module = self.settings.pattern, self.learned
        assert module is not None
        q, k = self._rotated(q, k, context)
        if decisions is None:
            with timed(context.traffic, "selection", (q,)):
                index, _ = self._select(q, k, context)
            tape = Tape()
        else:
            index, tape = decisions.index, Tape(saved, decisions.plans)
        branches = learned_branches(
            pattern, module, q, k, v, index, context, tape,
            shared=self._shared(context), exchange=self._exchange(context), scale=self.scale,
        )  # fmt: skip
        loss = None
        if learn and module.training:
            with torch.enable_grad():
                loss = own_loss(pattern, module, q, k, context, self._heads(k, context))
        return Attended(branches, tape.saved, Decisions(index, None, tape.plans), loss)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        context: AttentionContext,
        decisions: Decisions | None,
        saved: tuple[Tensor, ...] | None,
    ) -> Attended:
        saved = context.given if saved is None else saved
        q, k = self._rotated(q, k, context)
        shared = self._shared(context)
        if decisions is None:
            with timed(context.traffic, "selection", (q,)):
                index, verticals = self._select(q, k, context)
            plan = plan_attention(
                q, k, v, index=index, verticals=verticals, **shared, **self._exchange(context)
            )
            decisions = Decisions(index, verticals, (plan,))
        given = None if saved is None else (saved[0], saved[1])
        out, lse = context_parallel_attention(
            q,
            k,
            v,
            index=decisions.index,
            verticals=decisions.verticals,
            plan=decisions.plans[0],
            scale=self.scale,
            saved=given,
            traffic=context.traffic,
            **shared,
        )
        if context.record is not None:
            context.record.append((out.detach(), lse.detach(), decisions.index))
        return Attended((out,), (out, lse), decisions)

    def _heads(self, k: Tensor, context: AttentionContext) -> dict[str, Any]:
        settings = self.settings
        return {
            "layer": self.layer,
            "num_layers": len(settings.windows),
            "kv_head_offset": settings.tensor_rank * k.shape[2],
            "total_kv_heads": settings.total_kv_heads,
            "doc_ids": context.doc_ids,
        }

    @torch.no_grad()
    def search_whole(self, q: Tensor, k: Tensor, context: AttentionContext) -> BlockIndex | None:
        """What an `Excerpt` of this sequence needs as its `index`: the blocks that a pattern which goes by
        distances finds in the whole of it, from q [B, T, N, D] and k [B, T, K, D] before rotary embedding.
        None where this layer's pattern can look at the excerpt itself.
        """
        pattern = self.settings.pattern
        if not self.searches_whole:
            return None
        index, verticals = self._select(*self._rotated(q, k, context), context)
        assert verticals is None, f"{pattern.kind} must round its verticals up to blocks"
        return index

    @property
    def searches(self) -> bool:
        """Whether this layer's blocks are found online, from queries and keys."""
        pattern = self.settings.pattern
        return not pattern.static and not pattern.is_dense_layer(self.layer, len(self.settings.windows))

    @property
    def searches_whole(self) -> bool:
        """Whether they are so, and go by distances in the whole sequence."""
        return self.searches and self.settings.pattern.by_distance

    def _select(self, q: Tensor, k: Tensor, context: AttentionContext) -> tuple[BlockIndex, Tiles | None]:
        """The blocks to attend over the whole sequence, and single keys beside them where the pattern chooses
        any; equal on all ranks of the group.
        """
        settings, layout = self.settings, context.layout
        assert layout is not None
        pattern, num_layers = settings.pattern, len(settings.windows)
        heads = self._heads(k, context)
        verticals = None
        dense = pattern.is_dense_layer(self.layer, num_layers)
        excerpt = context.excerpt
        if excerpt is not None and excerpt.index is not None and not dense:
            index = excerpt.index.select(excerpt.blocks, excerpt.blocks)
        elif pattern.static or dense:
            # A pattern by distance is that of the whole sequence, cut to the blocks at hand.
            cut = excerpt is not None and not dense and pattern.kind != "dense"
            source = excerpt.whole if cut else context
            assert source.layout is not None
            num_tokens, doc_ids = source.layout.num_tokens, source.doc_ids
            index = source.cached(
                ("index", dense, layout.block),
                lambda: pattern.index(
                    num_tokens=num_tokens,
                    num_heads=q.shape[2],
                    num_kv_heads=k.shape[2],
                    block=layout.block,
                    device=q.device,
                    **(heads | {"doc_ids": doc_ids}),
                ),
            )
            if cut:
                index = index.select(excerpt.blocks, excerpt.blocks)
        else:
            selection = select_distributed(
                pattern, q.detach(), k.detach(), layout=layout, group=context.group, module=self.learned,
                traffic=context.traffic, **heads,
            )  # fmt: skip
            index = selection.index
            if selection.verticals is not None:
                verticals = selection.verticals.tiles(index)
        share = 1.0 if excerpt is None else excerpt.pair_share
        if context.query_blocks is not None:
            index = only_rows(index, context.query_blocks)
            share *= pattern.density(index, num_tokens=layout.num_tokens, doc_ids=context.doc_ids)
        elif pattern.kind != "dense":

            def density() -> float:
                return pattern.density(index, num_tokens=layout.num_tokens, doc_ids=context.doc_ids)

            # An index that was found for this layer alone is gone when the next layer's has its address.
            constant = (pattern.static or dense) and excerpt is None
            share *= context.cached(("density", dense), density) if constant else density()
        if share < 1 or pattern.kind != "dense":
            context.densities[self.layer] = share
        return index, verticals
