"""A `transformers` model that attends by the project's patterns: an attention function and a cache for it.

The model's own code runs unchanged; `AttentionInterface` hands q, k and v of every layer to us. B sequences,
n new tokens of each, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltrain.attention import patterns
from ltrain.generation.cache import SparseCache
from ltrain.generation.layer_rules import layer_rules
from ltrain.generation.rules import Shape
from ltrain.model.attention_file import TrainedAttention
from ltrain.model.pattern_weights import load_modules
from ltrain.model.spec import ModelSpec

IMPLEMENTATION = "ltrain_sparse"


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    caches: Sequence[SparseCache],
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention of layer `module.layer_idx` over each sequence's cache: [B, H, n, D] to [B, n, H, D]."""
    rows = [
        cache.attend(module.layer_idx, query[b], key[b], value[b], scaling) for b, cache in enumerate(caches)
    ]
    return torch.stack(rows), None


class SparseModel:
    """A Llama, Qwen2, Qwen3 or Mistral model of `transformers` under a pattern of attention.

    The model is changed in place: from then on it runs through this class only. `attention` is as
    `choose_attention` gives it. Raises ConfigError where the pattern needs weights of its own that the folder
    of the model doesn't hold.
    """

    def __init__(self, model: Any, spec: ModelSpec, attention: TrainedAttention) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(IMPLEMENTATION, _attention)
        model.set_attn_implementation(IMPLEMENTATION)
        self.model, self.spec, self.attention = model.eval(), spec, attention
        self.device = next(model.parameters()).device
        pattern = patterns.from_config(attention.pattern)
        self.rules = layer_rules(
            pattern,
            Shape(spec.num_heads, spec.num_kv_heads, spec.num_layers, attention.block),
            spec.windows,
            load_modules(spec, pattern, device=self.device, dtype=model.dtype),
        )

    def new_cache(self) -> SparseCache:
        return SparseCache(self.rules, self.attention.block)

    @torch.no_grad()
    def hidden(self, tokens: Tensor, caches: Sequence[SparseCache], *, search: bool) -> Tensor:
        """Read tokens [B, n], each row after its cache; final hidden states [B, n, E].

        `search`: the tokens are a prompt, from which patterns are found; others are decoded. Sequences may
        differ in length.
        """
        count = tokens.shape[1]
        position = torch.tensor([[cache.length] for cache in caches]) + torch.arange(count)
        for cache in caches:
            cache.begin(count, search=search)
        output = self.model.base_model(
            input_ids=tokens.to(self.device),
            position_ids=position.to(self.device),
            use_cache=False,
            caches=caches,
        )
        for cache in caches:
            cache.end()
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits fp32 [..., V] of hidden states."""
        return self.model.get_output_embeddings()(hidden).float()

    def dense_bytes(self, num_tokens: int) -> int:
        """Bytes of a dense cache of `num_tokens` tokens: keys and values of every layer."""
        spec = self.spec
        return 2 * spec.num_layers * spec.kv_size * num_tokens * self.model.dtype.itemsize


@torch.no_grad()
def greedy(
    model: SparseModel, prompts: Sequence[Sequence[int]], max_tokens: int, *, end: int | None = None
) -> tuple[list[list[int]], list[SparseCache]]:
    """Greedy continuations of prompts of any lengths, decoded together, and their caches.

    A continuation ends before the token `end`, or after `max_tokens`. Raises ValueError on an empty prompt.
    """
    caches, logits = [], []
    for prompt in prompts:
        if not len(prompt):
            raise ValueError("a prompt needs a token")
        caches.append(model.new_cache())
        hidden = model.hidden(torch.tensor([list(prompt)]), [caches[-1]], search=True)
        logits.append(model.logits(hidden[0, -1]))
    found: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    while going:
        chosen = {row: int(logits[row].argmax()) for row in going}
        going = [row for row in going if chosen[row] != end]
        for row in going:
            found[row].append(chosen[row])
        going = [row for row in going if len(found[row]) < max_tokens]
        if going:
            tokens = torch.tensor([[chosen[row]] for row in going])
            hidden = model.hidden(tokens, [caches[row] for row in going], search=False)
            for row, state in zip(going, hidden[:, -1], strict=True):
                logits[row] = model.logits(state)
    return found, caches
