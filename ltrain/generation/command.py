"""`ltrain generate`: greedy continuations of prompts, and the size of the cache that they took."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ltrain.config.base import ConfigError


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = command.add_argument
    add("model", type=Path, metavar="MODEL", help="Hugging Face folder, as training and export write it")
    add("--prompt", nargs="+", default=[], metavar="TEXT", help="texts to continue, decoded together")
    add("--prompt-file", nargs="+", type=Path, default=[], metavar="FILE", help="files that hold one each")
    add("--max-tokens", type=int, default=64, help="tokens of a continuation")
    add(
        "--attention",
        default="trained",
        metavar="A",
        help="trained (as ltrain.json says), dense, or a pattern as YAML: '{kind: s2, stride: 8}'",
    )
    add("--block", type=int, default=None, metavar="N", help="tokens of a block (default: as trained)")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="type of the weights")


def run(args: argparse.Namespace) -> int:
    """Generate and print."""
    from ltrain.generation.choice import choose_attention
    from ltrain.generation.loading import check_folder, load_sparse
    from ltrain.generation.model import greedy

    prompts = [*args.prompt, *map(_text, args.prompt_file)]
    if not prompts or not all(prompts):
        raise ConfigError(
            "--prompt", prompts, "must name texts that are not empty", "give one, or --prompt-file"
        )
    if args.max_tokens < 1:
        raise ConfigError("--max-tokens", args.max_tokens, "must be at least 1")
    check_folder(args.model)
    attention = choose_attention(args.model, args.attention, args.block)
    model, tokenizer = load_sparse(args.model, attention, device=args.device, dtype=args.dtype)
    ids = []
    for prompt in prompts:
        tokens = tokenizer.encode(prompt).tolist()
        ids.append(tokens if tokenizer.eos_id is None else tokens[:-1])
    longest = max(map(len, ids)) + args.max_tokens
    context = model.spec.rope.max_position_embeddings
    if longest > context:
        rule = f"needs {longest} positions with this prompt, the model has max_position_embeddings={context}"
        raise ConfigError("--max-tokens", args.max_tokens, rule, "shorten the prompt or the answer")
    start = time.perf_counter()
    outputs, caches = greedy(model, ids, args.max_tokens, end=tokenizer.eos_id)
    seconds = time.perf_counter() - start
    for prompt, output in zip(prompts, outputs, strict=True):
        print(f"{_end(prompt)}|{tokenizer.decode(output)}\n")
    held = sum(cache.nbytes for cache in caches)
    dense = sum(model.dense_bytes(cache.length) for cache in caches)
    made, read = sum(map(len, outputs)), sum(map(len, ids))
    print(
        f"{attention.pattern.kind}: {made} tokens after {read} in {seconds:.1f} s; "
        f"cache {held / 2**20:.2f} MiB, dense {dense / 2**20:.2f} MiB ({held / dense:.1%})"
    )
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError("--prompt-file", str(path), f"cannot be read: {reason}") from None


def _end(prompt: str, longest: int = 200) -> str:
    """The last characters of a prompt."""
    return prompt if len(prompt) <= longest else f"…{prompt[-longest:]}"
