"""mcore's GPT with a loss that never holds the logits."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from ltrain.model.loss import chunked_cross_entropy
from ltrain.parallel.stage_link import SubspaceLink


class LanguageModel(GPTModel):
    """A `GPTModel` whose last stage returns, for labels [1, T], the loss's sum and every token's loss.

    The two come as one fp32 tensor [1 + T]: entry 0 is the differentiable sum, the others are constants.
    Without labels it returns logits as mcore does. `real_vocab_size` is the vocabulary without the padding
    that tensor parallelism needs; `loss_chunk_tokens` and `z_loss` as in the `train` section.

    `link_in` and `link_out` are the compressed boundaries before and behind this stage, None where
    activations cross as they are. mcore's schedule needs no part in it: with variable sequence lengths the
    stages tell each other the shape of what they send, and a gradient has the shape of what was received.
    """

    def __init__(
        self,
        *args: Any,
        real_vocab_size: int,
        loss_chunk_tokens: int = 1024,
        z_loss: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.real_vocab_size = real_vocab_size
        self.loss_chunk_tokens = loss_chunk_tokens
        self.z_loss = z_loss
        self.link_in: SubspaceLink | None = None
        self.link_out: SubspaceLink | None = None

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.link_in is not None:
            # [T, 1, rank] -> [T, 1, E]; mcore keeps the received leaf and sends its gradient back.
            received = self.link_in.receive(self.decoder.input_tensor, input_ids.t())
            self.decoder.set_input_tensor(received)
        output = super().forward(input_ids, *args, **kwargs)
        return output if self.link_out is None else self.link_out.send(output)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        labels = kwargs.get("labels")
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states, *args, **kwargs)
        tp_size = self.pg_collection.tp.size()
        group = self.pg_collection.tp if tp_size > 1 else None
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        elif group is not None:
            hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        # [T, 1, E] -> [T, E]
        total, nll = chunked_cross_entropy(
            hidden_states.flatten(0, 1),
            weight,
            labels.flatten(),
            group=group,
            vocab_start=self.pg_collection.tp.rank() * weight.shape[0],
            vocab_size=self.real_vocab_size,
            chunk=self.loss_chunk_tokens,
            z_loss=self.z_loss,
        )
        return torch.cat((total.reshape(1), nll))
