"""Block scores against their definition: causal or not, grouped heads, a short last block."""

import pytest
import torch

from ltrain_kernels.block_scores import block_scores
from ltrain_kernels.errors import ArgumentError


def _qk(batch, tokens, heads, kv_heads, dim, seed=0):
    make = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, tokens, heads, dim, generator=make)
    return q, torch.randn(batch, tokens, kv_heads, dim, generator=make)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "batch,tokens,heads,kv_heads,block",
    [(1, 64, 2, 2, 16), (2, 75, 4, 2, 16), (1, 9, 3, 1, 16), (1, 33, 1, 1, 1)],
)
def test_equals_the_definition(batch, tokens, heads, kv_heads, block, causal):
    q, k = _qk(batch, tokens, heads, kv_heads, 8)
    found = block_scores(q, k, block, causal=causal, scale=0.25)
    expected = block_scores(q.double(), k.double(), block, causal=causal, scale=0.25, backend="reference")
    assert found.shape == (batch, -(-tokens // block), -(-tokens // block))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    if causal:
        assert not found.triu(1).any()


def test_holds_no_square_matrix():
    q, k = _qk(1, 2048, 1, 1, 4)
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                biggest = max(biggest, out.numel())
            return out

    with Watch():
        block_scores(q, k, 32)
    assert biggest <= 32 * 2048


def test_bad_arguments_are_named():
    q, k = _qk(1, 8, 3, 2, 4)
    with pytest.raises(ArgumentError, match="must divide the 3 query heads"):
        block_scores(q, k, 4)
    with pytest.raises(ArgumentError, match="must agree with q"):
        block_scores(q, k[:, :4], 4)
