"""Memory of a run in closed form: parameters, gradients, optimizer state, activations, loss."""

from __future__ import annotations

from dataclasses import dataclass

from ltrain.model.spec import ModelSpec

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank: the fixed part and the part that grows with the tokens it holds."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.loss


def saved_bytes_per_token_layer(spec: ModelSpec, element_bytes: int) -> float:
    """Bytes that one layer saves for its backward, a token, unsharded.

    Norm inputs (2 E), inputs of the four linears (E, Q, E, F), the fused projection (Q + 2 K), rotated
    queries and keys (Q + K), gate and up (2 F), the gate's activation (F), and fp32 statistics: two norms and
    the LSE.
    """
    e, q, k, f = spec.hidden_size, spec.q_size, spec.kv_size, spec.ffn_hidden_size
    elements = 4 * e + q + (q + 2 * k) + (q + k) + 4 * f
    return elements * element_bytes + 4 * (2 + spec.num_heads)


def estimate_memory(
    spec: ModelSpec,
    *,
    tokens: int,
    bf16: bool,
    tensor: int,
    pipeline: int,
    shards: int,
    loss_chunk_tokens: int,
) -> MemoryEstimate:
    """Memory of a rank of the first pipeline stage that holds `tokens` tokens of a micro-batch.

    `shards` ranks share the optimizer state (1 without the distributed optimizer). With pipeline parallelism
    the first stage keeps the activations of `pipeline` micro-batches.
    """
    element = 2 if bf16 else 4
    layers = spec.num_layers / pipeline
    count = layers * spec.layer_parameters + spec.embedding_parameters / (1 if pipeline == 1 else 2)
    count /= tensor
    activations = saved_bytes_per_token_layer(spec, element) * layers * tokens * pipeline / tensor
    head = min(tokens, loss_chunk_tokens) * spec.padded_vocab_size(tensor) / tensor * (4 + 4 + element)
    output = spec.hidden_size * spec.vocab_size / tensor * 4
    return MemoryEstimate(
        parameters=count * element,
        gradients=count * 4,
        optimizer=count * (12 if bf16 else 8) / shards,
        activations=activations,
        loss=head + output + 2 * tokens * spec.hidden_size * element,
    )


def longest_context(spec: ModelSpec, budget_bytes: float, *, context: int, **rest: object) -> int:
    """Tokens of the longest sequence whose share fits one rank of `context` that has `budget_bytes`; 0 if
    none.
    """
    fixed = estimate_memory(spec, tokens=0, **rest).total  # type: ignore[arg-type]
    slope = (estimate_memory(spec, tokens=1 << 20, **rest).total - fixed) / (1 << 20)  # type: ignore[arg-type]
    return max(0, int((budget_bytes - fixed) / slope)) * context if budget_bytes > fixed else 0
