"""Runs the Triton kernels of rows and block scores in the interpreter; prints their errors as JSON.

A program of its own, because a process either interprets its kernels or compiles them.
"""

from __future__ import annotations

import json

import torch

from ltrain_kernels.block_scores import block_scores
from ltrain_kernels.rows import reference, triton_rows


def rows(dtype: torch.dtype, size: int, shape3: bool) -> dict[str, float]:
    make = torch.Generator().manual_seed(0)
    shape = (13, 1, size) if shape3 else (13, size)
    x = torch.randn(shape, generator=make).to(dtype)
    weight = torch.randn(size, generator=make).to(dtype)
    at = torch.tensor([0, 3, 4, 9, 12])
    kept, normed, rstd = triton_rows.norm_rows(x, at, weight, 1e-6)
    leaf, w = (t.double().requires_grad_() for t in (x, weight))
    expected = reference.norm_rows(leaf, at, w, 1e-6)
    grad = torch.randn(expected.shape, generator=make).to(dtype)
    base = torch.randn(shape, generator=make).to(dtype)
    expected.backward(grad.double())
    dx = base.clone()
    dweight = triton_rows.norm_rows_backward(grad, kept, at, weight, rstd, dx)
    y = torch.randn(expected.shape, generator=make).to(dtype)
    added = triton_rows.write_rows(x, at, y, add=True)
    replaced = triton_rows.write_rows(x, at, y, add=False)

    def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((found.double() - wanted).abs().max() / wanted.abs().max())

    untouched = torch.ones(13, dtype=torch.bool)
    untouched[at] = False
    return {
        "kept": float(not torch.equal(kept, x[at])),
        "normed": error(normed, expected.detach()),
        "dx": error(dx, base.double() + leaf.grad),
        "dx of other rows": float(not torch.equal(dx[untouched], base[untouched])),
        "dweight": error(dweight, w.grad),
        "add": error(added, reference.add_rows(x.double(), at, y.double())),
        "replace": float(not torch.equal(replaced, reference.replace_rows(x, at, y))),
    }


def scores(
    tokens: int, heads: int, kv_heads: int, dim: int, causal: bool, block: int = 16
) -> dict[str, float]:
    make = torch.Generator().manual_seed(1)
    q = torch.randn(2, tokens, heads, dim, generator=make)
    k = torch.randn(2, tokens, kv_heads, dim, generator=make)
    found = block_scores(q, k, block, causal=causal, scale=0.5, backend="triton")
    wanted = block_scores(q.double(), k.double(), block, causal=causal, scale=0.5, backend="reference")
    return {"scores": float((found - wanted).abs().max() / wanted.max())}


def main() -> None:
    print(
        json.dumps(
            {
                "rows": rows(torch.float32, 24, False),
                "rows, odd size": rows(torch.float32, 33, True),
                "rows, bf16": rows(torch.bfloat16, 32, True),
                "scores": scores(64, 2, 2, 16, False),
                "scores, causal": scores(64, 2, 1, 16, True),
                "scores, ragged": scores(41, 4, 2, 8, True),
                "scores, wide": scores(300, 2, 1, 8, True, block=128),
            }
        )
    )


if __name__ == "__main__":
    main()
