"""Cost of finding a pattern beside the attention that it saves, on this machine.

    python tools/bench/patterns.py --tokens 16384 --heads 8 --kv-heads 2 --head-dim 64 --repeats 3

Inputs have what vertical-slash is made for: a sink, keys that every query attends, rotary-like locality.
Prints one row a pattern: seconds of the search, of attention forward and backward over its selection, the
density of its blocks, and the share of the dense softmax kept (over eight blocks of queries).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ltrain.attention import patterns
from ltrain.attention.patterns import Selection, selected_attention


def structured(tokens: int, heads: int, kv_heads: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with a sink, 16 heavy keys and a slow positional band in half of the dims."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, tokens, n, dim, generator=generator) for n in (heads, kv_heads, kv_heads))
    q[..., 0] += 4.0
    heavy = torch.randperm(tokens, generator=generator)[:16]
    k[:, heavy, :, 0] += 10.0
    k[:, 0, :, 0] += 16.0
    angle = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(dim // 4) / (dim // 4))[None]
    band = torch.cat([angle.cos(), angle.sin()], -1)[None, :, None] * 1.6
    q[..., dim // 2 :] = 0.5 * q[..., dim // 2 :] + band
    k[..., dim // 2 :] = 0.5 * k[..., dim // 2 :] + band
    return q, k, v


def median_s(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("tokens", 16384), ("heads", 8), ("kv-heads", 2), ("head-dim", 64), ("block", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    q, k, v = structured(args.tokens, args.heads, args.kv_heads, args.head_dim, args.seed)
    for x in (q, k, v):
        x.requires_grad_()
    choices = {
        "dense": patterns.dense(),
        "sliding_window": patterns.sliding_window(window=1024, sinks=64),
        "s2": patterns.s2(local_blocks=4, stride=args.kv_heads),
        "vertical_slash, blocks": patterns.vertical_slash(max_verticals=128, max_slashes=8),
        "vertical_slash, tokens": patterns.vertical_slash(
            max_verticals=128, max_slashes=8, verticals="tokens"
        ),
        "xattention, pool 4": patterns.xattention(threshold=0.8),
        "xattention, pool 1": patterns.xattention(threshold=0.8, pool=1),
        "block_topk": patterns.block_topk(top_k=8),
        "nsa (selected branch)": patterns.nsa(top_k=8),
    }
    rows = [int(r) for r in torch.linspace(1, -(-args.tokens // args.block) - 1, 8)]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(args)}")
    print("| pattern | search s | attention fwd+bwd s | search / attention | block density | mass kept |")
    print("|---|---|---|---|---|---|")
    for name, pattern in choices.items():
        module = pattern.make_module(num_heads=args.heads, num_kv_heads=args.kv_heads, head_dim=args.head_dim)

        def search(pattern: patterns.Pattern = pattern, module: torch.nn.Module | None = module) -> Selection:
            return pattern.select(
                num_tokens=args.tokens,
                num_kv_heads=args.kv_heads,
                num_heads=args.heads,
                block=args.block,
                q=q,
                k=k,
                module=module,
            )

        found = search()

        def attend(found: Selection = found) -> None:
            tiles = found.verticals.tiles(found.index) if found.verticals is not None else None
            out, _ = selected_attention(q, k, v, found, tiles=tiles)
            out.sum().backward()

        search_s, attend_s = median_s(search, args.repeats), median_s(attend, args.repeats)
        density = pattern.density(found.index, num_tokens=args.tokens)
        mass = float(patterns.attention_mass(q, k, found, row_blocks=rows).mean())
        cells = (
            f"{search_s:.4f}",
            f"{attend_s:.3f}",
            f"{search_s / attend_s:.3f}",
            f"{density:.3f}",
            f"{mass:.3f}",
        )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
