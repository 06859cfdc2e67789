"""Speed and size of the codec: compress, encode, decode, decompress of a large tensor.

python tools/bench/sync_codec.py [--entries 100000000] [--threads 2] [--repeats 3]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch

from ltrain.sync import Payload, compress, decompress


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=int, default=100_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    side = 1 << 13
    x = torch.randn(args.entries // side, side, generator=generator).to(args.device)
    print(f"{x.numel()} entries, {args.threads} threads, {args.device}, torch {torch.__version__}")
    print(
        "| bits | k of 4096 | compress s | encode | decode | decompress | sum s | bits/value | below fp32 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")

    def clock() -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    for bits, k in ((1, 64), (2, 64), (1, 16), (1, 256)):
        times = []
        for _ in range(args.repeats):
            marks = [clock()]
            payload = compress(x, density=k / 4096, bits=bits, square=True)
            marks.append(clock())
            data = payload.to_bytes()
            marks.append(clock())
            received = Payload.from_bytes(data)
            marks.append(clock())
            decompress(received)
            marks.append(clock())
            times.append([b - a for a, b in itertools.pairwise(marks)])
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        cells = " | ".join(f"{value:.2f}" for value in [*medians, sum(medians)])
        per_value = 8 * len(data) / payload.num_values
        print(f"| {bits} | {k} | {cells} | {per_value:.2f} | {4 * x.numel() / len(data):.0f}x |")


if __name__ == "__main__":
    main()
