"""Every backend that runs here against the definition: out, lse, dq, dk, dv."""

from __future__ import annotations

import pytest
import torch

from kernels.cases import CASES, Case, relative
from ltrain_kernels.block_sparse import block_sparse_attention


def run(tensors, index, options, backend, dout=None, dlse=None):
    inputs = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = block_sparse_attention(*inputs, index, backend=backend, **options)
    if dout is None:
        return [out, lse]
    lse_part = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse) * dlse
    ((out * dout.to(out.dtype)).sum() + lse_part.sum()).backward()
    return [out.detach(), lse.detach(), *(x.grad for x in inputs)]


def compare(case: Case, dtype: torch.dtype, backend: str, tolerance: float) -> None:
    tensors, index, options = case.make(dtype)
    rng = torch.Generator().manual_seed(1)
    dout = torch.randn(*tensors[0].shape[:3], case.v_size, generator=rng, dtype=torch.float64)
    dlse = torch.randn(case.batch, case.heads, case.tq, generator=rng, dtype=torch.float64)
    want = run([x.double() for x in tensors], index, options, "reference", dout, dlse)
    got = run(tensors, index, options, backend, dout, dlse.to(torch.promote_types(dtype, torch.float32)))
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert a.shape == b.shape, name
        assert not torch.isnan(a).any(), name
        assert relative(a, b) <= tolerance, (name, relative(a, b))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
    "dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
def test_agrees_with_the_definition(case, dtype, tolerance):
    compare(case, dtype, "cpu", tolerance)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_empty_batch(backend):
    tensors, index, options = Case("no_batch", batch=0).make()
    out, lse = block_sparse_attention(*tensors, index, backend=backend, **options)
    assert out.shape == (0, 200, 4, 16) and lse.shape == (0, 4, 200)
