"""Peak memory of the chunked loss against whole logits, forward and backward; prints one JSON line a variant.

python tools/bench/loss_memory.py --tokens 16384 --vocab 131072 --hidden 2048
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from ltrain.model.loss import chunked_cross_entropy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=1024)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device: the allocator's peak is what is measured")
    results = {}
    for name in ("whole", "chunked"):
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        hidden = torch.randn(
            args.tokens, args.hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True
        )
        weight = torch.randn(args.vocab, args.hidden, device="cuda", dtype=torch.bfloat16) * 0.02
        weight.requires_grad_()
        labels = torch.randint(0, args.vocab, (args.tokens,), device="cuda")
        seconds = []
        for _ in range(5):
            hidden.grad = weight.grad = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            if name == "whole":
                loss = torch.nn.functional.cross_entropy(
                    (hidden @ weight.t()).float(), labels, reduction="sum"
                )
            else:
                loss, _ = chunked_cross_entropy(hidden, weight, labels, chunk=args.chunk)
            loss.backward()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() - before
        results[name] = peak
        facts = {
            "variant": name,
            "peak_gib": peak / 2**30,
            "median_ms": 1e3 * sorted(seconds)[2],
            "loss": float(loss),
        }
        print(json.dumps(facts), flush=True)
        del hidden, weight, labels, loss
    print(json.dumps({"whole_over_chunked": results["whole"] / results["chunked"]}))


if __name__ == "__main__":
    main()
