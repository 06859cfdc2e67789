"""Every backend that runs here against the definition: out, lse, dq, dk, dv."""

from __future__ import annotations

import pytest
import torch

from kernels.cases import CASES, Case, relative
from ltrain_kernels.block_sparse import (
    ArgumentError,
    BlockIndex,
    attention_backward,
    attention_delta,
    attention_forward,
    block_sparse_attention,
    cpu,
    prepare,
    strided,
)
from ltrain_kernels.block_sparse.reference import visible_tokens
from ltrain_kernels.lse_merge import merge


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


FEW = [case for case in CASES if case.name in ("plain", "packed", "window_packed", "empty_rows", "v_size")]


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fallback_without_a_compiler(case, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "extension_loaded", lambda: False)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    compare(case, dtype, "cpu", tolerance)


def test_a_missing_compiler_warns_once(monkeypatch):
    def fail(**_):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("torch.utils.cpp_extension.load", fail)
    cpu.extension_loaded.cache_clear()
    tensors, index, options = CASES[0].make(torch.float32)
    try:
        with pytest.warns(RuntimeWarning, match="no compiler here") as caught:
            first, _ = block_sparse_attention(*tensors, index, **options)
            block_sparse_attention(*tensors, index, **options)
        assert len(caught) == 1
        want, _ = block_sparse_attention(*tensors, index, backend="reference", **options)
        assert relative(first, want) < 1e-5
    finally:
        cpu.extension_loaded.cache_clear()


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_bf16_is_as_good_as_flash_attention(case):
    """Error against fp64 on the same bf16 inputs, at most twice that of a softmax with bf16 products."""
    tensors, index, options = case.make(torch.bfloat16)
    want, _ = block_sparse_attention(*[x.double() for x in tensors], index, backend="reference", **options)
    got, lse = block_sparse_attention(*tensors, index, backend="cpu", **options)
    assert got.dtype == torch.bfloat16 and lse.dtype == torch.float32
    # What a flash kernel rounds: the probabilities before the second product, and the result.
    plan = prepare(index, **options)
    q, k, v = (x.float() for x in tensors)
    flash = torch.zeros_like(want)
    for b in range(case.batch):
        for h in range(case.heads):
            mask = visible_tokens(plan, index.to_mask()[0, h * index.heads // case.heads], b)
            scores = (q[b, :, h] @ k[b, :, h * case.kv_heads // case.heads].T) * case.size**-0.5
            top = scores.masked_fill(~mask, -1e30).amax(-1, keepdim=True)
            weights = torch.where(mask, torch.exp(scores - top), 0.0)
            product = weights.bfloat16().float() @ v[b, :, h * case.kv_heads // case.heads]
            flash[b, :, h] = (product / weights.sum(-1, keepdim=True).clamp(min=1e-30)).bfloat16().double()
    assert relative(got, want) <= 2 * relative(flash, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients(dtype):
    compare(Case("half", docs=(70,)), dtype, "cpu", 1e-2)


def test_backward_is_bitwise_deterministic():
    tensors, index, options = Case("deterministic", tq=500, tk=500, docs=(100, 333)).make(torch.float32)
    rng = torch.Generator().manual_seed(1)
    dout = torch.randn(2, 500, 4, 16, generator=rng)
    dlse = torch.randn(2, 4, 500, generator=rng)
    first = run(tensors, index, options, "cpu", dout, dlse)
    for _ in range(3):
        for a, b in zip(run(tensors, index, options, "cpu", dout, dlse), first, strict=True):
            assert torch.equal(a, b)


def test_strided_inputs_are_read_in_place():
    tensors, index, options = Case("strided").make(torch.float64)
    want = run(tensors, index, options, "cpu")
    fused = torch.cat([x.flatten(2) for x in tensors], -1)
    views = fused.split([x.shape[2] * x.shape[3] for x in tensors], -1)
    views = [a.unflatten(-1, x.shape[2:]) for a, x in zip(views, tensors, strict=True)]
    views[1] = views[1].transpose(1, 2).contiguous().transpose(1, 2)
    for a, b in zip(run(views, index, options, "cpu"), want, strict=True):
        assert relative(a, b) < 1e-13


def test_closed_form_is_the_mask_form():
    index = strided(200, 32, local=2, stride=3, residues=[0, 2], sinks=1)
    case = Case("closed")
    tensors, _, options = case.make()
    plain = BlockIndex.from_mask(index.to_mask(), 32, 32)
    rng = torch.Generator().manual_seed(1)
    dout, dlse = torch.randn(2, 200, 4, 16, generator=rng), torch.randn(2, 4, 200, generator=rng)
    got = run(tensors, index, options, "cpu", dout, dlse)
    for a, b in zip(got, run(tensors, plain, options, "cpu", dout, dlse), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shards_add_up_to_the_whole(backend, dtype):
    """Striped query shards against striped key shards, merged; backward with the merged lse and delta."""
    tokens, block, ranks = 200, 16, 3
    case = Case("shards", block_q=block, block_k=block, index_heads=2, docs=(90,))
    (q, k, v), index, options = case.make(dtype)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    want_out, want_lse = attention_forward(q, k, v, index, backend="reference", out_dtype=wide, **options)
    blocks = [torch.arange(rank, -(-tokens // block), ranks) for rank in range(ranks)]
    ids = [(b[:, None] * block + torch.arange(block)).reshape(-1) for b in blocks]
    ids = [x[x < tokens] for x in ids]
    grads = [torch.zeros(x.shape, dtype=wide) for x in (q, k, v)]
    for mine in range(ranks):
        a = ids[mine]
        steps = [
            (
                index.select(blocks[mine], blocks[other]),
                ids[other],
                {
                    "q_pos": options["q_pos"][a],
                    "k_pos": options["k_pos"][ids[other]],
                    "q_doc": options["q_doc"][a],
                    "k_doc": options["k_doc"][ids[other]],
                },
            )
            for other in range(ranks)
        ]
        parts = [
            attention_forward(q[:, a], k[:, c], v[:, c], part, backend=backend, out_dtype=wide, **where)
            for part, c, where in steps
        ]
        out, lse = merge(parts)
        limit = 1e-12 if dtype == torch.float64 else 4e-3
        assert relative(out, want_out[:, a]) < limit and relative(lse, want_lse[:, :, a]) < limit
        delta = attention_delta(out, dout[:, a])
        for part, c, where in steps:
            into = tuple(torch.zeros(x.shape, dtype=wide) for x in (q[:, a], k[:, c], v[:, c]))
            made = attention_backward(
                dout[:, a], q[:, a], k[:, c], v[:, c], delta, lse, part, backend=backend, grads=into, **where
            )
            assert all(x is y for x, y in zip(made, into, strict=True))
            for grad, x, at in zip(grads, made, (a, c, c), strict=True):
                grad[:, at] += x
    delta = attention_delta(want_out, dout)
    want = attention_backward(
        dout,
        q,
        k,
        v,
        attention_delta(want_out, dout),
        want_lse,
        index,
        backend="reference",
        out_dtype=wide,
        **options,
    )
    for a, b in zip(grads, want, strict=True):
        assert relative(a, b) < (1e-12 if dtype == torch.float64 else 1e-2)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_by_finite_differences(backend):
    """Directional derivative of <dout, out> + <dlse, lse> in fp64 with the index frozen."""
    tensors, index, options = Case("fd", tq=70, tk=70, docs=(30,), empty=("rows",)).make()
    rng = torch.Generator().manual_seed(2)
    dout = torch.randn(2, 70, 4, 16, generator=rng, dtype=torch.float64)
    dlse = torch.randn(2, 4, 70, generator=rng, dtype=torch.float64)
    grads = run(tensors, index, options, backend, dout, dlse)[2:]
    steps = [torch.randn(x.shape, generator=rng, dtype=torch.float64) for x in tensors]

    def value(t):
        out, lse = block_sparse_attention(
            *[x + t * step for x, step in zip(tensors, steps, strict=True)], index, backend=backend, **options
        )
        return (out * dout).sum() + (torch.where(torch.isinf(lse), 0.0, lse) * dlse).sum()

    h = 1e-5
    numeric = (value(h) - value(-h)) / (2 * h)
    exact = sum((g * step).sum() for g, step in zip(grads, steps, strict=True))
    assert abs(numeric - exact) < 1e-7 * abs(exact)


@pytest.mark.parametrize(
    "change,argument",
    [
        (lambda t, o: t.__setitem__(0, t[0][0]), "q.shape"),
        (lambda t, o: t.__setitem__(1, t[1].float()), "k.dtype"),
        (lambda t, o: t.__setitem__(0, t[0].long()), "q.dtype"),
        (lambda t, o: t.__setitem__(1, t[1][..., :3]), "k.shape"),
        (lambda t, o: t.__setitem__(2, t[2][:, :50]), "v.shape"),
        (lambda t, o: t.__setitem__(0, t[0][:, :, :3]), "k.shape[2]"),
        (lambda t, o: t.__setitem__(0, t[0][:, :100]), "q.shape[1]"),
        (lambda t, o: o.__setitem__("k_pos", None), "q_pos, k_pos"),
        (lambda t, o: o.__setitem__("backend", "gpu"), "backend"),
        (lambda t, o: t.__setitem__(slice(0, 3), [x[:, :, [0, 1, 0]] for x in t]), "index.heads"),
    ],
)
def test_bad_arguments_are_named(change, argument):
    tensors, index, options = Case("bad").make()
    change(tensors, options)
    with pytest.raises(ArgumentError) as error:
        block_sparse_attention(*tensors, index, **options)
    assert error.value.argument == argument


@pytest.mark.parametrize("heads,kv_heads", [(8, 1), (4, 2), (3, 3)])
def test_bits_do_not_depend_on_the_number_of_threads(heads, kv_heads):
    """Few key/value heads: the backward cuts rows into parts, whose sums must not follow the threads."""
    tensors, index, options = Case("t", heads=heads, kv_heads=kv_heads, index_heads=1, tq=333, tk=333).make()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            dout = torch.ones(*tensors[0].shape[:3], tensors[2].shape[3])
            dlse = torch.ones(tensors[0].shape[0], heads, 333)
            results.append(run([x.float() for x in tensors], index, options, "cpu", dout, dlse))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
