"""What all layers of a run share: which blocks are kept at a step, and the sequences they make."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ltrain.attention.context import AttentionContext, Excerpt
from ltrain.attention.half import Cut
from ltrain.config.elimination import BlockElimination
from ltrain.elimination.inputs import LayerInputs
from ltrain.elimination.scorers import Scorer
from ltrain.elimination.select import keep_best
from ltrain.elimination.sequence import BlockedSequence, as_blocks
from ltrain_kernels.block_sparse import BlockIndex


@dataclass(frozen=True, eq=False)
class Choice:
    """What a sparse layer works on: the kept blocks, int64 [K], of `sequence`, and where their tokens lie.

    `cut` names rows of this rank's residual, `local_rows` int64 those of its context-parallel shard, which
    sequence parallelism cuts in parts; both ascending. The cut is padded so that all tensor-parallel ranks
    have the same number; `real_rows` are then the others among the ranks' rows together.
    """

    sequence: BlockedSequence
    blocks: np.ndarray
    cut: Cut
    local_rows: Tensor
    real_rows: Tensor | None

    @property
    def rows(self) -> Tensor:
        return self.cut.ids


class Elimination:
    """Token elimination of a run; `step` optimizer steps are done, and the next is what layers work on.

    `ratios` is one a layer of the whole model. Nothing here depends on the number of ranks, and everything
    follows from configuration, step and row, so that a resumed run goes on bit for bit.
    """

    def __init__(
        self, config: BlockElimination, ratios: tuple[float, ...], scorer: Scorer, *, block: int, steps: int,
        seed: int,
    ) -> None:  # fmt: skip
        self.config, self.ratios, self.scorer = config, ratios, scorer
        self.block, self.steps, self.seed = block, steps, seed
        self.step = 0

    def ratio(self, layer: int) -> float:
        """The layer's ratio at this step: it rises linearly to 1 over the last `anneal` of the steps."""
        ratio = self.ratios[layer]
        first = self.steps * (1 - self.config.anneal)
        if self.config.anneal and self.step >= first:
            ratio += (1 - ratio) * min(1.0, (self.step + 1 - first) / (self.steps - first))
        return ratio if ratio < 1 else 1.0

    def sequence(self, context: AttentionContext) -> BlockedSequence:
        assert context.layout is not None
        layout = context.layout
        return context.cached(
            ("blocks", self.block),
            lambda: BlockedSequence.of(layout, self.block, context.doc_ids, context.targets),
        )

    def choose(self, layer: int, inputs: LayerInputs) -> Choice:
        """The blocks that `layer` keeps of the sequence at hand, made once and then kept with the context: a
        recomputation in the backward pass gets the same object."""
        return inputs.context.cached(("kept", layer), lambda: self._choose(layer, inputs))

    @torch.no_grad()
    def _choose(self, layer: int, inputs: LayerInputs) -> Choice:
        context, sequence, config = inputs.context, inputs.sequence, self.config
        ratio = self.ratio(layer)
        quotas = context.cached(
            ("quotas", ratio),
            lambda: sequence.quotas(
                ratio,
                config.strata,
                sinks=config.sink_blocks,
                local=config.local_blocks,
                targets=config.target_blocks,
            ),
        )
        scores = self.scorer.score(inputs)
        for group in (inputs.attention.pg_collection.tp, context.group):
            if group is not None and group.size() > 1:
                # Ranks compute the same scores; a choice that differs by a rounding would hang the exchange.
                dist.broadcast(scores, dist.get_global_rank(group, 0), group=group)
        # Copied once: layouts and plans of the kept blocks are the host's work.
        scores = scores.cpu()
        kept = keep_best(scores, quotas)
        positive = scores.clamp(min=0)
        whole = positive[torch.from_numpy(quotas.cell >= 0)].sum().clamp(min=1e-30)
        share = sequence.num_tokens_of(as_blocks(kept)) / max(sequence.layout.num_tokens, 1)
        context.eliminated[layer] = (share, float(positive[kept].sum() / whole))
        return self._rows(as_blocks(kept), inputs)

    def _rows(self, blocks: np.ndarray, inputs: LayerInputs) -> Choice:
        sequence, device = inputs.sequence, inputs.x.device
        local = sequence.rows_of(inputs.context.rank, blocks)
        rows, padding, real = local, 0, None
        if inputs.sharded and inputs.attention.pg_collection.tp.size() > 1:
            group = inputs.attention.pg_collection.tp
            size = inputs.x.shape[0]
            counts = np.bincount(local // size, minlength=group.size())
            most, me = int(counts.max()), group.rank()
            rows = local[local // size == me] - me * size
            padding = most - len(rows)
            place = np.concatenate([np.arange(n) + i * most for i, n in enumerate(counts)])
            real = torch.from_numpy(place).to(device)
        local_rows = torch.from_numpy(local).to(device)
        ids = local_rows if rows is local else torch.from_numpy(rows).to(device)
        return Choice(sequence, blocks, Cut(ids, padding), local_rows, real)

    def excerpt(
        self,
        inputs: LayerInputs,
        choice: Choice,
        given: tuple[Tensor, Tensor] | None = None,
        index: BlockIndex | None = None,
    ) -> AttentionContext:
        """The sequence of the kept tokens: their layout, and their places and documents in the whole one.

        `given` is the kept tokens' (out, lse) where they have attended already, `index` what a pattern found
        online for it in the whole sequence. Without that, a pattern that goes by distances is searched in the
        whole sequence, which costs the dropped tokens' queries and keys, without gradient.
        """
        context = inputs.context
        assert context.rope_positions is not None
        sequence, blocks, local = choice.sequence, choice.blocks, choice.local_rows
        ids = torch.from_numpy(sequence.token_ids(blocks))
        docs = context.doc_ids
        tables = inputs.attention.core_attention.rotary_tables(context, inputs.x.device)
        whole = self._fine(context, sequence)
        found = self._search(inputs) if index is None else index
        pairs = sequence.visible_pairs(blocks, blocks) / max(sequence.documents.total_pairs, 1)
        return replace(
            context,
            layout=sequence.kept_layout(blocks),
            rope_positions=context.rope_positions.index_select(0, local),
            doc_ids=None if docs is None else docs.index_select(-1, ids.to(docs.device)),
            rope_tables=None,
            excerpt=Excerpt(whole, blocks, ids.to(local.device, torch.int32), local, tables, pairs, found),
            real_rows=choice.real_rows,
            given=given,
            _cache={},
        )

    @torch.no_grad()
    def _search(self, inputs: LayerInputs) -> BlockIndex | None:
        core = inputs.attention.core_attention
        if not core.searches_whole:
            return None
        found: BlockIndex | None = core.search_whole(*inputs.queries_and_keys(), inputs.context)
        return found

    def _fine(self, context: AttentionContext, sequence: BlockedSequence) -> AttentionContext:
        """The whole sequence in blocks of elimination; its static indices are shared by the layers."""
        return context.cached(
            ("fine", self.block), lambda: replace(context, layout=sequence.layout, _cache={})
        )

    def queries_only(self, context: AttentionContext, choice: Choice) -> AttentionContext:
        """The whole sequence, of which only the kept blocks ask."""
        return replace(self._fine(context, choice.sequence), query_blocks=choice.blocks)

    def recorded(
        self, context: AttentionContext, into: list[tuple[Tensor, Tensor, BlockIndex]]
    ) -> AttentionContext:
        """The whole sequence, whose attention and index also go to `into`."""
        return replace(context, record=into)
