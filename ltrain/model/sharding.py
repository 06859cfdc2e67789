"""Which slice of which Hugging Face tensor each sharded parameter holds: one map, read both ways.

mcore fuses queries, keys and values into one linear, interleaved by KV group (q1 q2 k1 v1, q3 q4 k2 v2, ...),
and gate and up into another whose every tensor-parallel shard is [gate part, up part].
"""

from __future__ import annotations

from dataclasses import dataclass

from ltrain.model.spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Piece:
    """`start:stop` of the Hugging Face tensor `name` on dimension `dim` is `offset:offset + stop - start` of
    a parameter's shard."""

    name: str
    dim: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Shard:
    """One parameter of one rank: its shape, and the pieces that fill it. Rows that no piece fills are
    padding."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint, in the order of the layers."""
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, hidden)}
    for i in range(spec.num_layers):
        layer = f"model.layers.{i}."
        attention = layer + "self_attn."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", spec.q_size), ("k", spec.kv_size), ("v", spec.kv_size)):
            shapes[f"{attention}{name}_proj.weight"] = (rows, hidden)
            if spec.qkv_bias:
                shapes[f"{attention}{name}_proj.bias"] = (rows,)
        if spec.qk_norm:
            shapes[attention + "q_norm.weight"] = shapes[attention + "k_norm.weight"] = (spec.head_dim,)
        shapes[attention + "o_proj.weight"] = (hidden, spec.q_size)
        if spec.o_bias:
            shapes[attention + "o_proj.bias"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        shapes[layer + "mlp.gate_proj.weight"] = shapes[layer + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[layer + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    if not spec.tie_embeddings:
        shapes[HEAD] = (spec.vocab_size, hidden)
    return shapes


def stage_shards(
    spec: ModelSpec, *, stage: int, stages: int, tensor_rank: int, tensor_size: int
) -> dict[str, Shard]:
    """Every parameter of this pipeline stage and tensor-parallel rank, by its name in mcore's `GPTModel`."""
    per_stage = spec.num_layers // stages
    shards: dict[str, Shard] = {}
    if stage == 0:
        shards["embedding.word_embeddings.weight"] = _vocab(spec, EMBEDDING, tensor_rank, tensor_size)
    for local in range(per_stage):
        prefix = f"decoder.layers.{local}."
        hf = f"model.layers.{stage * per_stage + local}."
        for name, shard in _layer(spec, hf, tensor_rank, tensor_size).items():
            shards[prefix + name] = shard
    if stage == stages - 1:
        shards["decoder.final_layernorm.weight"] = _whole("model.norm.weight", (spec.hidden_size,))
        if not spec.tie_embeddings:
            shards["output_layer.weight"] = _vocab(spec, HEAD, tensor_rank, tensor_size)
        elif stages > 1:
            shards["output_layer.weight"] = _vocab(spec, EMBEDDING, tensor_rank, tensor_size)
    return shards


def _layer(spec: ModelSpec, hf: str, rank: int, size: int) -> dict[str, Shard]:
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size // size
    qkv = _qkv_pieces(spec, hf, rank, size)
    qkv_rows = (spec.q_size + 2 * spec.kv_size) // size
    first = rank * ffn
    gate_up = (
        Piece(hf + "mlp.gate_proj.weight", 0, first, first + ffn, 0),
        Piece(hf + "mlp.up_proj.weight", 0, first, first + ffn, ffn),
    )
    columns = spec.q_size // size
    o = Piece(hf + "self_attn.o_proj.weight", 1, rank * columns, (rank + 1) * columns, 0)
    down = Piece(hf + "mlp.down_proj.weight", 1, first, first + ffn, 0)
    shards = {
        "input_layernorm.weight": _whole(hf + "input_layernorm.weight", (hidden,)),
        "self_attention.linear_qkv.weight": Shard((qkv_rows, hidden), _named(qkv, "weight")),
        "self_attention.linear_proj.weight": Shard((hidden, columns), (o,)),
        "pre_mlp_layernorm.weight": _whole(hf + "post_attention_layernorm.weight", (hidden,)),
        "mlp.linear_fc1.weight": Shard((2 * ffn, hidden), gate_up),
        "mlp.linear_fc2.weight": Shard((hidden, ffn), (down,)),
    }
    if spec.qkv_bias:
        shards["self_attention.linear_qkv.bias"] = Shard((qkv_rows,), _named(qkv, "bias"))
    if spec.o_bias:
        shards["self_attention.linear_proj.bias"] = _whole(hf + "self_attn.o_proj.bias", (hidden,))
    if spec.qk_norm:
        for name in ("q", "k"):
            norm = _whole(f"{hf}self_attn.{name}_norm.weight", (spec.head_dim,))
            shards[f"self_attention.{name}_layernorm.weight"] = norm
    return shards


def _qkv_pieces(spec: ModelSpec, hf: str, rank: int, size: int) -> list[Piece]:
    """Pieces of the fused linear, with names that lack `weight` or `bias`."""
    d, groups = spec.head_dim, spec.num_kv_heads // size
    per_group = spec.num_heads // spec.num_kv_heads
    pieces, offset = [], 0
    for group in range(rank * groups, (rank + 1) * groups):
        for name, heads in (("q", per_group), ("k", 1), ("v", 1)):
            rows = heads * d
            pieces.append(Piece(f"{hf}self_attn.{name}_proj.", 0, group * rows, (group + 1) * rows, offset))
            offset += rows
    return pieces


def _named(pieces: list[Piece], suffix: str) -> tuple[Piece, ...]:
    return tuple(Piece(p.name + suffix, p.dim, p.start, p.stop, p.offset) for p in pieces)


def _whole(name: str, shape: tuple[int, ...]) -> Shard:
    return Shard(shape, (Piece(name, 0, 0, shape[0], 0),))


def _vocab(spec: ModelSpec, name: str, rank: int, size: int) -> Shard:
    rows = spec.padded_vocab_size(size) // size
    start, stop = min(rank * rows, spec.vocab_size), min((rank + 1) * rows, spec.vocab_size)
    pieces = (Piece(name, 0, start, stop, 0),) if stop > start else ()
    return Shard((rows, spec.hidden_size), pieces)
