"""Loss of a text that several ranks share: the model as the trainer builds it, context-parallel over all.

T tokens of the text, T_local of them on this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ltrain.attention import patterns
from ltrain.attention.context import AttentionContext
from ltrain.attention.module import AttentionSettings, CoreAttention
from ltrain.config.base import ConfigError
from ltrain.data.rows import IGNORE
from ltrain.model.attention_file import TrainedAttention
from ltrain.model.build import build_model
from ltrain.model.families import read_spec
from ltrain.model.language_model import LanguageModel
from ltrain.model.pattern_weights import check_stored, init_pattern
from ltrain.model.sources import check_weights
from ltrain.model.spec import ModelSpec
from ltrain.model.weights import import_model
from ltrain.parallel import seam
from ltrain.parallel.layout import SequenceLayout
from ltrain.parallel.mesh import Axis, init_mesh

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def check_context_parallel(folder: Path, dtype: str) -> None:
    """Raise ConfigError where several ranks cannot share the texts of a folder's model."""
    spec = read_spec(folder)
    check_weights(spec)
    _dtype(spec, dtype)


def _dtype(spec: ModelSpec, dtype: str) -> torch.dtype:
    name = spec.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        rule = "is not a type that the engine computes in"
        raise ConfigError("config.json: dtype", name, rule, "use --dtype bf16 or --dtype fp32")
    return DTYPES[name]


class ContextParallelModel:
    """The model of a folder over all ranks of the default group, each holding a part of every text."""

    def __init__(self, folder: Path, attention: TrainedAttention, *, dtype: str = "auto") -> None:
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        spec, pattern = read_spec(folder), patterns.from_config(attention.pattern)
        check_stored(folder, pattern)
        self.mesh = init_mesh(context=dist.get_world_size())
        self.spec, self.block = spec, attention.block
        with seam.cpu_seam():
            model_parallel_cuda_manual_seed(0, force_reset_rng=True)
        settings = AttentionSettings(
            rope=spec.rope,
            windows=spec.windows,
            pattern=pattern,
            total_kv_heads=spec.num_kv_heads,
        )
        self.model = build_model(
            spec,
            core_attention=partial(CoreAttention, settings=settings),
            model_class=LanguageModel,
            real_vocab_size=spec.vocab_size,
            context=self.mesh.context.size,
            dtype=_dtype(spec, dtype),
        ).to(self.mesh.device)
        import_model(self.model, spec, self.mesh)
        init_pattern(self.model, spec, pattern, self.mesh, seed=0)
        self.model.eval()

    @torch.no_grad()
    def losses(self, ids: Sequence[int]) -> Tensor:
        """Loss (nats) of every token but the first, fp32 [T - 1] on the CPU; equal on all ranks. Collective.

        A text of fewer blocks than ranks is read by every rank alone.
        """
        axis, device = self.mesh.context, self.mesh.device
        count = len(ids)
        if count < axis.size * self.block:
            axis = self.mesh.tensor  # whose size is 1
        layout = SequenceLayout("striped", count, axis.size, self.block)
        whole = torch.tensor(ids)
        labels = torch.full_like(whole, IGNORE)
        labels[:-1] = whole[1:]
        local = layout.positions(axis.rank).long()
        rope_positions = local.to(device, torch.int32)
        context = AttentionContext(
            qkv_format="sbhd",
            layout=layout,
            group=axis.group,
            rank=axis.rank,
            rope_positions=rope_positions,
            # Some kinds of rope have other frequencies for other lengths.
            rope_tables=replace(self.spec.rope, seq_len=count).tables(rope_positions, device=device),
        )
        output = self.model(
            input_ids=whole[local][None].to(device),
            position_ids=None,
            attention_mask=None,
            labels=labels[local][None].to(device),
            packed_seq_params=context,
        )
        return self._whole(output[1:].float(), layout, axis)[: count - 1].cpu()

    def _whole(self, nll: Tensor, layout: SequenceLayout, axis: Axis) -> Tensor:
        """Token losses of all ranks of the axis in document order."""
        longest = max(layout.lengths)
        sent = torch.nn.functional.pad(nll, (0, longest - len(nll)))
        received = sent.new_empty(axis.size * longest)
        dist.all_gather_into_tensor(received, sent, group=axis.group)
        shards = [row[:length] for row, length in zip(received.split(longest), layout.lengths, strict=True)]
        return layout.unshard(shards, 0)
