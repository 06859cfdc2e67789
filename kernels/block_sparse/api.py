"""Attention over selected blocks: the differentiable call, and its forward and backward by themselves.

B batch, Tq query tokens, Tk key tokens, Hq query heads, Hkv key/value heads (Hq a multiple of it), D size of
a query head, Dv size of a value head. A pair (query, key) is visible iff its block is selected, k_pos <=
q_pos, both are of the same document and, with a window, q_pos - k_pos < window.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ltrain_kernels.block_sparse import cpu, reference
from ltrain_kernels.block_sparse.index import BlockIndex
from ltrain_kernels.block_sparse.plan import Plan, prepare
from ltrain_kernels.errors import ArgumentError, require

Backend = Literal["auto", "reference", "cpu", "triton"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex | Plan,
    *,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    q_doc: Tensor | None = None,
    k_doc: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    saved: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the visible pairs, and the log of its normaliser.

    q [B, Tq, Hq, D], k [B, Tk, Hkv, D], v [B, Tk, Hkv, Dv]; positions and documents int [T] or [B, T];
    `scale` defaults to D ** -0.5. Returns out [B, Tq, Hq, Dv] in q's dtype and lse [B, Hq, Tq], natural log,
    fp32 (fp64 for fp64 inputs). A query that sees no key has out 0, lse -inf and gradient 0. Differentiable
    in q, k, v, through out and through lse; the index is a constant. The backward is deterministic.

    `index` may be a `Plan` (see `prepare`), which already holds the positions, documents and window. `saved`
    is (out, lse) of an earlier call on equal inputs: it is returned without being computed, and the gradients
    are those of the call (for activation checkpointing). `backend="auto"` is `triton` for tensors on a GPU,
    else `cpu`. Raises ArgumentError on arguments that do not fit one another.
    """
    plan = _plan(index, q_pos, k_pos, q_doc, k_doc, window)
    scale = _check(q, k, v, plan, scale)
    if saved is not None:
        want = ((*q.shape[:3], v.shape[3]), (q.shape[0], q.shape[2], q.shape[1]))
        shapes = tuple(tuple(x.shape) for x in saved)
        require(shapes == want, "saved shapes", shapes, f"must be those of out and lse, {want}")
    elif _resolve(backend, q) == "reference":
        return reference.reference_attention(q, k, v, plan, scale)
    return _Attention.apply(q, k, v, plan, scale, backend, saved)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: BlockIndex | Plan,
    *,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    q_doc: Tensor | None = None,
    k_doc: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`block_sparse_attention` without autograd, with out in `out_dtype` (q's by default; fp32 for partial
    results that are to be merged).
    """
    plan = _plan(index, q_pos, k_pos, q_doc, k_doc, window)
    scale = _check(q, k, v, plan, scale)
    with torch.no_grad():
        return _forward(q, k, v, plan, scale, backend, out_dtype or q.dtype)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse: Tensor,
    index: BlockIndex | Plan,
    *,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    q_doc: Tensor | None = None,
    k_doc: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
    out_dtype: torch.dtype | None = None,
    grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one call that may be a part of a larger attention.

    `lse` [B, Hq, Tq] is that of the whole rows (merged over all parts) and `delta` is `attention_delta(out,
    dout)` of the merged out: then the parts' gradients add up to the whole's, with no other state. Returns
    new tensors in `out_dtype` (each input's dtype by default), or, given `grads` = (dq, dk, dv) buffers of
    the inputs' shapes, adds to them and returns them (fp32 buffers keep ring steps exact).
    """
    plan = _plan(index, q_pos, k_pos, q_doc, k_doc, window)
    scale = _check(q, k, v, plan, scale)
    require(dout.shape == (*q.shape[:3], v.shape[3]), "dout.shape", tuple(dout.shape), "must be out's shape")
    rows = (q.shape[0], q.shape[2], q.shape[1])
    for name, x in (("delta", delta), ("lse", lse)):
        require(x.shape == rows, f"{name}.shape", tuple(x.shape), f"must be [B, Hq, Tq] = {rows}")
    if grads is not None:
        for name, grad, x in zip(("dq", "dk", "dv"), grads, (q, k, v), strict=True):
            require(
                grad.shape == x.shape, f"grads {name}.shape", tuple(grad.shape), f"must be {tuple(x.shape)}"
            )
    with torch.no_grad():
        return _backward(dout, q, k, v, delta, lse, plan, scale, backend, out_dtype, grads)


def attention_delta(out: Tensor, dout: Tensor, dlse: Tensor | None = None) -> Tensor:
    """Sum over Dv of out * dout, less the gradient of lse if it has one: [B, Hq, Tq], fp32 (fp64)."""
    dtype = torch.promote_types(out.dtype, torch.float32)
    if out.is_cuda and dtype == torch.float32:
        return _triton().delta(out, dout, dlse)
    delta = (out.to(dtype) * dout.to(dtype)).sum(-1).transpose(1, 2)
    return (delta if dlse is None else delta - dlse.to(dtype)).contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, backend, saved):
        if saved is None:
            out, lse = _forward(q, k, v, plan, scale, backend, q.dtype)
        else:
            out, lse = (x.detach() for x in saved)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale, ctx.backend = plan, scale, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        if dlse is not None:
            # A row without keys has lse -inf whatever q and k are.
            dlse = torch.where(torch.isinf(lse), 0.0, dlse)
        delta = attention_delta(out, dout, dlse)
        grads = _backward(dout, q, k, v, delta, lse, ctx.plan, ctx.scale, ctx.backend, None, None)
        return *grads, None, None, None, None


def _forward(
    q, k, v, plan: Plan, scale: float, backend: Backend, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    chosen = _resolve(backend, q)
    if chosen == "reference":
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = reference.reference_attention(q.to(wide), k.to(wide), v.to(wide), plan, scale)
        return out.to(out_dtype), lse
    if chosen == "cpu":
        return cpu.forward(q, k, v, plan, scale, out_dtype)
    return _triton().forward(q, k, v, plan, scale, out_dtype)


def _backward(dout, q, k, v, delta, lse, plan: Plan, scale: float, backend: Backend, out_dtype, grads):
    chosen = _resolve(backend, q)
    if chosen == "reference":
        made = reference.reference_backward(dout, q, k, v, delta, lse, plan, scale)
        if grads is None:
            return tuple(g.to(out_dtype or x.dtype) for g, x in zip(made, (q, k, v), strict=True))
        for into, grad in zip(grads, made, strict=True):
            into += grad
        return grads
    into = grads
    if into is None:
        into = tuple(torch.empty(x.shape, dtype=out_dtype or x.dtype, device=x.device) for x in (q, k, v))
    module = cpu if chosen == "cpu" else _triton()
    module.backward(dout, q, k, v, delta, lse, plan, scale, into, accumulate=grads is not None)
    return into


def _triton():
    # Imported when first used: Triton is not there on every platform.
    from ltrain_kernels.block_sparse import triton_attention

    return triton_attention


def _resolve(backend: Backend, q: Tensor) -> str:
    require(
        backend in ("auto", "reference", "cpu", "triton"),
        "backend",
        backend,
        "must be auto, reference, cpu or triton",
    )
    chosen = backend if backend != "auto" else ("triton" if q.is_cuda else "cpu")
    require(
        chosen != "cpu" or q.device.type == "cpu",
        "backend",
        backend,
        f"needs CPU tensors, q is on {q.device}",
    )
    return chosen


def _plan(index: BlockIndex | Plan, q_pos, k_pos, q_doc, k_doc, window) -> Plan:
    if isinstance(index, Plan):
        given = [x is not None for x in (q_pos, k_pos, q_doc, k_doc, window)]
        require(not any(given), "q_pos, k_pos, q_doc, k_doc, window", "given", "are already part of the plan")
        return index
    require(isinstance(index, BlockIndex), "index", type(index).__name__, "must be a BlockIndex or a Plan")
    if q_pos is None or k_pos is None:
        raise ArgumentError("q_pos, k_pos", (q_pos, k_pos), "must both be given with a BlockIndex")
    return prepare(index, q_pos=q_pos, k_pos=k_pos, q_doc=q_doc, k_doc=k_doc, window=window)


def _check(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None) -> float:
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.dim() == 4, f"{name}.shape", tuple(x.shape), "must be [batch, tokens, heads, head size]")
        require(x.dtype in DTYPES, f"{name}.dtype", x.dtype, "must be float64, float32, bfloat16 or float16")
        require(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"must be q's, {q.dtype}")
        require(x.device == q.device, f"{name}.device", x.device, f"must be q's, {q.device}")
    require(plan.index.device == q.device, "index.device", plan.index.device, f"must be q's, {q.device}")
    batch, tq, heads, size = q.shape
    kv_heads = k.shape[2]
    require(
        k.shape[0] == batch and k.shape[3] == size,
        "k.shape",
        tuple(k.shape),
        f"must be [{batch}, Tk, Hkv, {size}]",
    )
    require(
        v.shape[:3] == k.shape[:3], "v.shape", tuple(v.shape), f"must be {tuple(k.shape[:3])} and a head size"
    )
    require(
        kv_heads >= 1 and heads % kv_heads == 0,
        "k.shape[2]",
        kv_heads,
        f"must divide the {heads} query heads",
    )
    require(
        plan.index.heads in (1, kv_heads, heads),
        "index.heads",
        plan.index.heads,
        f"must be 1, the {kv_heads} key/value heads or the {heads} query heads",
    )
    require(
        plan.batch in (1, batch), "index.batch", plan.batch, f"must be 1 or q's batch {batch} (as positions')"
    )
    for name, have, want in (("q", tq, plan.num_tokens[0]), ("k", k.shape[1], plan.num_tokens[1])):
        require(have == want, f"{name}.shape[1]", have, f"must be the length of {name}_pos, {want}")
    return float(size) ** -0.5 if scale is None else float(scale)
