"""One model at every memory level, with our attention, its documents and its loss."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from ltrain.attention import patterns
from ltrain.attention.context import AttentionContext
from ltrain.attention.module import AttentionSettings, CoreAttention
from ltrain.config.model import HFModel, LoraAdapter
from ltrain.model.build import build_model
from ltrain.model.freeze import freeze_parameters
from ltrain.model.language_model import LanguageModel
from ltrain.model.lora import init_adapter
from ltrain.model.weights import import_model
from ltrain.parallel.layout import SequenceLayout
from ltrain.parallel.seam import cpu_seam

BLOCK = 16
NSA = {"top_k": 3, "local_blocks": 1, "compress": 4, "window": 24, "initial_gates": (0.5, 0.75, 0.25)}
GATE = {"top_k": 2, "gate_dim": 4, "target_rows": 2}
TARGETS = ("qkv", "o", "gate_up", "down")


def build_lean(folder, spec, mesh, level, *, pattern=None, adapter=None, dtype=torch.float64, **options):
    """A trained-from model of `level`; `adapter` names the linears with LoRA."""
    settings = AttentionSettings(
        rope=spec.rope,
        windows=spec.windows,
        pattern=pattern or patterns.dense(),
        total_kv_heads=spec.num_kv_heads,
        schedule=options.pop("schedule", "ring"),
        tensor_rank=mesh.tensor.rank,
    )
    lora = LoraAdapter(rank=3, alpha=6.0, targets=adapter) if adapter else None
    with cpu_seam():
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    model = build_model(
        spec,
        core_attention=partial(CoreAttention, settings=settings),
        model_class=LanguageModel,
        real_vocab_size=spec.vocab_size,
        tensor=mesh.tensor.size,
        context=mesh.context.size,
        lora=lora,
        memory_level=level,
        dtype=dtype,
        **options,
    )
    import_model(model, spec, mesh)
    if lora is not None:
        init_adapter(model, spec, lora, mesh, seed=3)
        with torch.no_grad():  # B is zero at the start: A would have no gradient
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.fill_(0.05)
        freeze_parameters(model, spec, HFModel(path=folder, adapter=lora), mesh)
    generator = torch.Generator().manual_seed(5 + mesh.tensor.rank)
    for name, parameter in model.named_parameters():
        if ".core_attention.learned." in name:  # nsa's are zero at the start
            with torch.no_grad():
                parameter.normal_(0, 0.5, generator=generator)
    for layer in model.decoder.layers:
        if hasattr(layer, "lean_mlp"):
            layer.lean_mlp.tile = 24 // mesh.tensor.size  # several tiles, the last one short
    return model


def batch(mesh, *, num_tokens=80, documents=(33, 1, 46), seed=0):
    """Tokens and labels [1, T_local], and a fresh context, of a packed sequence."""
    layout = SequenceLayout("striped", num_tokens, mesh.context.size, BLOCK)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 131, (num_tokens,), generator=generator)
    lengths = torch.tensor(documents or (num_tokens,))
    doc_ids = torch.arange(len(lengths)).repeat_interleave(lengths).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(torch.int32)
    at = layout.positions(mesh.context.rank).long()
    context = AttentionContext(
        qkv_format="sbhd",
        layout=layout,
        group=mesh.context.group,
        rank=mesh.context.rank,
        rope_positions=positions[at],
        doc_ids=doc_ids if documents else None,
        num_targets=len(at),
        step=3,
    )
    labels = tokens.roll(-1)
    return tokens[at][None], labels[at][None], context


def run(model, tokens, labels, context):
    """This rank's share of the loss."""
    output = model(
        input_ids=tokens, position_ids=None, attention_mask=None, labels=labels, packed_seq_params=context
    )
    return output[0]


def loss_and_gradients(model, tokens, labels, context):
    """The loss as a number and every gradient as an array, after one forward and backward."""
    model.zero_grad()
    loss = run(model, tokens, labels, context)
    loss.backward()
    gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return float(loss), gradients


class LateCopies:
    """Copies that happen as late as they may: a wait that is missing, or a buffer used too early, shows."""

    def __init__(self):
        self.queue, self.fetched, self.buffers, self.nbytes = [], 0, 0, 0

    def buffer(self, like):
        self.buffers += 1
        self.nbytes += like.nbytes
        return torch.full_like(like, torch.nan)

    def out(self, host, x):
        self.queue.append((host, x.clone()))

    def back(self, host):
        self.fetched += 1
        x = torch.full_like(host, torch.nan)
        self.queue.append((x, host))
        return x, len(self.queue)

    def wait(self, x, ticket):
        for target, source in self.queue:
            target.copy_(source)
        self.queue.clear()
