"""Size of the key/value cache and speed of decoding under patterns of attention, on this machine.

    python tools/bench/generation.py --contexts 16384 32768 65536 --new-tokens 12

A Llama-shaped model with random weights. Speed and size of a step do not depend on what the keys are, so the
context is not read: random keys and values are put where reading it would leave them. Each pattern decodes
`--new-tokens` tokens after two that are not timed; the median step counts. `transformers` is its own dense
cache and attention. Prints a table and, with --json, writes the figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from ltrain.attention.rope import Rope
from ltrain.generation.cache import SparseCache
from ltrain.generation.model import SparseModel
from ltrain.model.attention_file import TrainedAttention, parse_attention
from ltrain.model.spec import ModelSpec

PATTERNS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "s2": {"kind": "s2", "local_blocks": 8, "stride": 8},
    "longgen": {"kind": "longgen", "sparse": {"kind": "s2", "local_blocks": 8, "stride": 8}},
    "sliding_window": {"kind": "sliding_window", "window": 4096, "sinks": 128},
}


def model_and_spec(args: argparse.Namespace, longest: int) -> tuple[Any, ModelSpec]:
    head_dim = args.hidden // args.heads
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab,
        max_position_embeddings=longest,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    spec = ModelSpec(
        family="llama",
        hidden_size=args.hidden,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=args.ffn,
        vocab_size=args.vocab,
        norm_eps=1e-6,
        tie_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        qk_norm=False,
        windows=(None,) * args.layers,
        rope=Rope({"rope_type": "default", "rope_theta": 1e4}, head_dim, longest, longest),
    )
    return model, spec


def filled(model: SparseModel, context: int) -> SparseCache:
    """A cache as reading `context` tokens leaves it, of random keys and values."""
    cache, spec = model.new_cache(), model.spec
    cache.begin(context, search=True)
    for rule, store in zip(cache.rules, cache.stores, strict=True):
        k, v = (torch.randn(spec.num_kv_heads, context, spec.head_dim) for _ in range(2))
        store.load(cache.tables[id(rule)], k, v)
    cache.end()
    return cache


def step_times(step: Callable[[int], torch.Tensor], new_tokens: int) -> list[float]:
    times = []
    for token in range(new_tokens + 2):
        start = time.perf_counter()
        step(token)
        times.append(time.perf_counter() - start)
    return times[2:]


@torch.no_grad()
def in_transformers(model: Any, spec: ModelSpec, context: int, new_tokens: int) -> tuple[int, list[float]]:
    cache = DynamicCache(config=model.config)
    for layer in range(spec.num_layers):
        k, v = (torch.randn(1, spec.num_kv_heads, context, spec.head_dim) for _ in range(2))
        cache.update(k, v, layer)
    num_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    def step(token: int) -> torch.Tensor:
        return model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits

    return num_bytes, step_times(step, new_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("layers", 8), ("hidden", 1024), ("heads", 16), ("kv-heads", 8), ("ffn", 2816)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--contexts", type=int, nargs="+", default=[16384, 32768, 65536])
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    model, spec = model_and_spec(args, max(args.contexts) + args.new_tokens + 2)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(args)}")
    print("| context | cache | MiB | share of dense | tokens/s | over transformers |")
    print("|---|---|---|---|---|---|")
    figures = []
    for context in args.contexts:
        needed = 3 * 8 * spec.num_layers * spec.kv_size * context
        if psutil.virtual_memory().available < needed:
            print(f"| {context:,} | skipped: {needed / 2**30:.1f} GiB of memory may be needed |", flush=True)
            continue
        plain = in_transformers(model, spec, context, args.new_tokens)
        rows = {"transformers": plain}
        gc.collect()
        for name, pattern in PATTERNS.items():
            attention: TrainedAttention = parse_attention({"pattern": pattern, "block": args.block}, name)
            sparse = SparseModel(model, spec, attention)
            cache = filled(sparse, context)
            held = cache.nbytes

            def step(token: int, sparse: SparseModel = sparse, cache: SparseCache = cache) -> torch.Tensor:
                hidden = sparse.hidden(torch.tensor([[token]]), [cache], search=False)
                return sparse.logits(hidden)

            rows[name] = (held, step_times(step, args.new_tokens))
            del cache, step
            gc.collect()
        model.set_attn_implementation("sdpa")
        for name, (held, times) in rows.items():
            speed = 1 / statistics.median(times)
            share, ratio = held / plain[0], speed * statistics.median(plain[1])
            cells = (f"{held / 2**20:,.1f}", f"{share:.1%}", f"{speed:.1f}", f"{ratio:.2f}")
            print(f"| {context:,} | {name} | {' | '.join(cells)} |", flush=True)
            figures.append(
                {"context": context, "cache": name, "bytes": held, "dense_bytes": plain[0], "step_s": times}
            )
    if args.json is not None:
        args.json.write_text(json.dumps({"arguments": vars(args), "figures": figures}, default=str, indent=1))


if __name__ == "__main__":
    main()
