"""Row operations against plain PyTorch: results, every gradient, and what is left alone bit for bit."""

import pytest
import torch

from ltrain_kernels.errors import ArgumentError
from ltrain_kernels.rows import add_rows, close_rows, norm_rows, open_rows, reference


def _case(dtype=torch.float64, rows=(1, 2, 5, 6, 10), size=7, length=11):
    make = torch.Generator().manual_seed(3)
    x = torch.randn(length, size, generator=make, dtype=dtype)
    weight = torch.randn(size, generator=make, dtype=dtype)
    return x, weight, torch.tensor(rows, dtype=torch.int64)


@pytest.mark.parametrize("rows", [(1, 2, 5, 6, 10), (), tuple(range(11))])
def test_norm_and_add_equal_the_definition(rows):
    x, weight, rows = _case(rows=rows)
    matrix = torch.randn(7, 7, dtype=torch.float64)
    upstream = torch.randn_like(x)
    found = []
    for ours in (True, False):
        leaf, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            passed, normed = norm_rows(leaf, rows, w, 1e-6)
            out = add_rows(passed, rows, normed @ matrix)
        else:
            out = reference.add_rows(leaf, rows, reference.norm_rows(leaf, rows, w, 1e-6) @ matrix)
        out.backward(upstream)
        found.append((out.detach(), leaf.grad, w.grad))
    for name, a, b in zip(("out", "dx", "dweight"), *found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)
    dropped = torch.ones(11, dtype=torch.bool)
    dropped[rows] = False
    assert torch.equal(found[0][1][dropped], upstream[dropped])
    assert torch.equal(found[0][0][dropped], x[dropped])


def test_open_and_close_replace_rows():
    x, _, rows = _case()
    upstream = torch.randn_like(x)
    found = []
    for ours in (True, False):
        leaf = x.clone().requires_grad_()
        if ours:
            passed, taken = open_rows(leaf, rows)
            out = close_rows(passed, rows, taken + taken.square())
        else:
            out = reference.replace_rows(leaf, rows, leaf[rows] + leaf[rows].square())
        out.backward(upstream)
        found.append((out.detach(), leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-12)


def test_close_with_a_value_keeps_it_and_the_rows_gradients():
    x, _, rows = _case()
    leaf, value = x.clone().requires_grad_(), torch.randn_like(x)
    passed, taken = open_rows(leaf, rows)
    out = close_rows(passed, rows, 3 * taken, value)
    assert torch.equal(out, value)
    out.backward(torch.ones_like(x))
    expected = torch.ones_like(x)
    expected[rows] = 3
    assert torch.equal(leaf.grad, expected)


def test_only_the_listed_rows_are_saved():
    x, weight, rows = _case()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        leaf = x.clone().requires_grad_()
        passed, normed = norm_rows(leaf, rows, weight.clone().requires_grad_(), 1e-6)
        add_rows(passed, rows, normed)
    assert saved and all(shape[0] != len(x) for shape in saved if shape)


def test_a_frozen_norm_has_no_gradient():
    x, weight, rows = _case()
    leaf = x.clone().requires_grad_()
    passed, normed = norm_rows(leaf, rows, weight, 1e-6)
    add_rows(passed, rows, normed).sum().backward()
    assert leaf.grad is not None and weight.grad is None


def test_bad_arguments_are_named():
    x, weight, rows = _case()
    with pytest.raises(ArgumentError, match="weight"):
        norm_rows(x, rows, weight[:3], 1e-6)
    with pytest.raises(ArgumentError, match=r"y\.shape"):
        add_rows(x, rows, x)
    with pytest.raises(ArgumentError, match="int64"):
        open_rows(x, rows.int())
