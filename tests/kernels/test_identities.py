"""Identities of attention that need no reference, on the CPU backend, and the merge."""

from __future__ import annotations

import pytest
import torch

from kernels.cases import Case, relative
from ltrain_kernels.block_sparse import attention_backward, attention_delta, attention_forward
from ltrain_kernels.block_sparse.plan import prepare
from ltrain_kernels.block_sparse.reference import visible_tokens
from ltrain_kernels.errors import ArgumentError
from ltrain_kernels.lse_merge import merge

CASE = Case("identities", tq=90, tk=90, docs=(40,), density=0.6, empty=("rows",), block_q=16, block_k=16)


@pytest.fixture
def call():
    (q, k, v), index, options = CASE.make()
    plan = prepare(index, **options)
    mask = torch.stack([visible_tokens(plan, index.to_mask()[0, h], 0) for h in range(2)]).repeat_interleave(
        2, 0
    )
    return q, k, v, plan, mask


def test_forward_identities(call):
    q, k, v, plan, mask = call
    seen = mask.any(-1)
    out, lse = attention_forward(torch.zeros_like(q), k, v, plan)
    count = mask.sum(-1).double()
    assert relative(torch.exp(lse[0]), count) < 1e-12
    for h in range(4):
        mean = mask[h].double() @ v[0, :, h // 2] / count[h].clamp(min=1)[:, None]
        assert relative(out[0, :, h], mean) < 1e-12
    out, _ = attention_forward(q, k, torch.ones_like(v) * 3, plan)
    assert relative(out[0].transpose(0, 1), 3.0 * seen[..., None].double().expand(-1, -1, 16)) < 1e-12
    out, lse = attention_forward(q, k, v, plan)
    shift = torch.randn(16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    out_u, lse_u = attention_forward(q, k + shift, v, plan)
    assert relative(out_u, out) < 1e-11
    assert relative(lse_u, lse + 0.25 * (q @ shift).transpose(1, 2)) < 1e-11
    assert bool((torch.isinf(lse[0]) == ~seen).all())


def test_backward_identities(call):
    q, k, v, plan, mask = call
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    out, lse = attention_forward(q, k, v, plan)
    dq, dk, dv = attention_backward(dout, q, k, v, attention_delta(out, dout), lse, plan)
    assert float(dk.sum(1).norm()) < 1e-11 * float(dk.norm())
    live = torch.where(mask.any(-1).T[None, ..., None], dout, 0.0)
    want = live.sum(1).view(2, 2, 2, 16).sum(2)
    assert relative(dv.sum(1)[0], want[0]) < 1e-12
    assert abs((dout * out).sum() - (dv * v).sum()) < 1e-10
    per_group = (dq * q).sum((1, 3)).view(2, 2, 2).sum(2)
    assert relative(per_group, (dk * k).sum((1, 3))) < 1e-10


def test_changing_a_key_touches_only_rows_that_see_it(call):
    q, k, v, plan, mask = call
    out, lse = attention_forward(q, k, v, plan)
    k2, v2 = k.clone(), v.clone()
    k2[0, 37, 1] += 1.0
    v2[0, 37, 1] -= 1.0
    out2, lse2 = attention_forward(q, k2, v2, plan)
    for h in (2, 3):
        changed = (out2[0, :, h] != out[0, :, h]).any(-1)
        assert torch.equal(changed, mask[h, :, 37]) and bool(changed.any())
    assert torch.equal(out2[0, :, :2], out[0, :, :2]) and torch.equal(lse2[1], lse[1])


def test_more_blocks_never_lower_the_lse(call):
    q, k, v, plan, _ = call
    _, options = None, {"q_pos": plan.q_pos, "k_pos": plan.k_pos, "q_doc": plan.q_doc, "k_doc": plan.k_doc}
    more = plan.index.to_mask()
    more[..., ::2] = True
    _, low = attention_forward(q, k, v, plan)
    _, high = attention_forward(q, k, v, type(plan.index).from_mask(more, 16, 16), **options)
    assert bool((high >= low - 1e-12).all())


def test_repeated_key_heads_are_the_grouped_result(call):
    q, k, v, plan, _ = call
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    out, lse = attention_forward(q, k, v, plan)
    grads = attention_backward(dout, q, k, v, attention_delta(out, dout), lse, plan)
    heads = plan.index.select_heads([0, 0, 1, 1])
    wide = prepare(heads, q_pos=plan.q_pos, k_pos=plan.k_pos, q_doc=plan.q_doc, k_doc=plan.k_doc)
    k2, v2 = k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    out2, lse2 = attention_forward(q, k2, v2, wide)
    dq, dk, dv = attention_backward(dout, q, k2, v2, attention_delta(out2, dout), lse2, wide)
    summed = (dq, *(x.view(2, 90, 2, 2, 16).sum(3) for x in (dk, dv)))
    assert relative(out2, out) < 1e-13
    for a, b in zip(summed, grads, strict=True):
        assert relative(a, b) < 1e-13


def partials(n, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        lse = torch.randn(2, 3, 5, generator=rng, dtype=dtype) * 20
        lse[torch.rand(lse.shape, generator=rng) < 0.4] = float("-inf")
        made.append((torch.randn(2, 5, 3, 4, generator=rng, dtype=dtype), lse))
    return made


def test_merge_is_associative_with_a_neutral_element():
    a, b, c = partials(3)
    whole = merge([a, b, c])
    for other in (merge([merge([a, b]), c]), merge([c, merge([b, a])])):
        assert relative(other[0], whole[0]) < 1e-13 and relative(other[1], whole[1]) < 1e-13
    empty = (torch.full_like(a[0], float("nan")), torch.full_like(a[1], float("-inf")))
    out, lse = merge([empty, whole])
    assert torch.equal(out, whole[0]) and torch.equal(lse, whole[1])
    out, lse = merge([empty, empty])
    assert not out.any() and bool(torch.isinf(lse).all())


def test_merge_gradients():
    parts = [(o.requires_grad_(), s.requires_grad_()) for o, s in partials(3, seed=2)]
    out, lse = merge(parts)
    seen = ~torch.isinf(lse)
    (out.square().sum() + torch.where(seen, lse, 0.0).sum()).backward()
    grads = [x.grad.clone() for pair in parts for x in pair]
    assert all(torch.isfinite(g).all() for g in grads)
    steps = [torch.randn(x.shape, dtype=torch.float64) for pair in parts for x in pair]

    def value(t):
        flat = [x.detach() + t * step for x, step in zip([x for p in parts for x in p], steps, strict=True)]
        out, lse = merge(list(zip(flat[::2], flat[1::2], strict=True)))
        return out.square().sum() + torch.where(seen, lse, 0.0).sum()

    exact = sum((g * step).sum() for g, step in zip(grads, steps, strict=True))
    assert abs((value(1e-6) - value(-1e-6)) / 2e-6 - exact) < 1e-6 * abs(exact)


def test_merge_computes_in_fp32():
    parts = [(o.bfloat16(), s.float()) for o, s in partials(4, seed=3)]
    out, lse = merge(parts)
    want, _ = merge([(o.double(), s.double()) for o, s in parts])
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert relative(out, want) < 3e-3


def test_merge_names_bad_arguments():
    a, b = partials(2)
    for bad, argument in (
        ([], "partials"),
        ([a, (b[0][:1], b[1])], "partials[1].out.shape"),
        ([b[::-1]], "partials[0]"),
    ):
        with pytest.raises(ArgumentError) as error:
            merge(bad)
        assert error.value.argument == argument
