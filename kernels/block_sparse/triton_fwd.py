"""Forward kernel: one program holds a query tile (rows x packed heads) and streams its key blocks.

Online softmax in base 2, fp32 accumulation (FlashAttention-2, arXiv 2307.08691, section 3; block lists as in
arXiv 2407.17678). Full blocks come before partial ones: the mask is one branch, and with two loops the order
decides whether the assembler keeps the matrix pipeline (docs/attention_kernels_gpu.md).
"""

# ruff: noqa: SIM108 - an `if` on a constexpr chooses what is compiled; it reads better as a branch.

from __future__ import annotations

import triton
import triton.language as tl

from ltrain_kernels.block_sparse.triton_tiles import (
    LN2,
    PAD_KEY,
    PAD_QUERY,
    closed_row,
    load_item,
    load_pattern,
    load_tile,
    load_tokens,
    nth_entry,
    row_offsets,
    store_tile,
    visible,
)


@triton.jit
def online_softmax(s, v, acc, m, total, scale_log2, SAFE: tl.constexpr, PRECISION: tl.constexpr):
    """Fold scores s of one key tile into (acc, m, total). SAFE: a row may have seen nothing yet (m =
    -inf)."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    # Shifting such a row by 0 avoids (-inf) - (-inf).
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if SAFE else m_new
    p = tl.exp2(s * scale_log2 - shift[:, None])
    old = tl.exp2(m - shift)
    total = total * old + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision=PRECISION)
    return acc, m_new, total


@triton.jit
def attention_forward(
    q, k, v, out, lse,
    items, entries, pattern, q_pos, k_pos, q_doc, k_doc,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    pattern_h, qpos_b, kpos_b, qdoc_b, kdoc_b,
    num_q, num_k, num_heads, scale_log2, window,
    GROUP: tl.constexpr, PACK: tl.constexpr, PER_QUERY_HEAD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT_Q: tl.constexpr, SPLIT_K: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    CLOSED: tl.constexpr, HAS_DOC: tl.constexpr, HAS_WINDOW: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, ONE_LOOP: tl.constexpr,
):  # fmt: skip
    """Write out [B, Tq, Hq, DV] and lse [B, Hq, Tq] (natural log, fp32) of every query tile.

    ROWS query tokens x PACK query heads of one kv head make a tile; a sparse row is SPLIT_Q tiles, a sparse
    column SPLIT_K tiles of COLS keys. Programs that share a sparse row are neighbours, so that they share
    keys in L2.
    """
    GROUPS: tl.constexpr = 1 if PER_QUERY_HEAD else GROUP // PACK
    pid = tl.program_id(0)
    part = pid % (SPLIT_Q * GROUPS)
    b, head, row, first, full, tail, last = load_item(items, pid // (SPLIT_Q * GROUPS))
    if PER_QUERY_HEAD:
        h = head
    else:
        h = head * GROUP + (part // SPLIT_Q) * PACK
    kv = h // GROUP
    t = row * (SPLIT_Q * ROWS) + (part % SPLIT_Q) * ROWS
    local, sinks, stride, residue = first, first, first, first
    if CLOSED:
        local, sinks, stride, residue = load_pattern(pattern, head, pattern_h)
    q_tile = load_tile(q, b, h, t, num_q, q_b, q_h, q_t, PACK, ROWS, D, BLOCK_D, False, UPCAST)
    acc = tl.zeros([PACK * ROWS, BLOCK_DV], tl.float32)
    m = tl.full([PACK * ROWS], float("-inf"), tl.float32)
    total = tl.zeros([PACK * ROWS], tl.float32)

    whole = (tail - full) * SPLIT_K
    count = whole + (full - first + last - tail) * SPLIT_K
    if not ONE_LOOP:
        for i in tl.range(0, whole):
            n = full + i // SPLIT_K
            if CLOSED:
                j = closed_row(n, row, local, sinks, stride, residue)
            else:
                j = tl.load(entries + n)
            s = (j * SPLIT_K + i % SPLIT_K) * COLS
            k_tile = load_tile(k, b, kv, s, num_k, k_b, k_h, k_t, 1, COLS, D, BLOCK_D, TMA, UPCAST)
            v_tile = load_tile(v, b, kv, s, num_k, v_b, v_h, v_t, 1, COLS, DV, BLOCK_DV, TMA, UPCAST)
            x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            acc, m, total = online_softmax(x, v_tile, acc, m, total, scale_log2, False, PRECISION)

    qp = load_tokens(q_pos, b, t, num_q, qpos_b, PACK, ROWS, PAD_QUERY)
    qd = qp
    if HAS_DOC:
        qd = load_tokens(q_doc, b, t, num_q, qdoc_b, PACK, ROWS, -1)
    for i in tl.range(0 if ONE_LOOP else whole, count, num_stages=None if ONE_LOOP else 1):
        n = full + i // SPLIT_K
        if CLOSED:
            n = nth_entry(i // SPLIT_K, first, full, tail)
            j = closed_row(n, row, local, sinks, stride, residue)
        else:
            j = tl.load(entries + n)
        s = (j * SPLIT_K + i % SPLIT_K) * COLS
        k_tile = load_tile(k, b, kv, s, num_k, k_b, k_h, k_t, 1, COLS, D, BLOCK_D, TMA, UPCAST)
        v_tile = load_tile(v, b, kv, s, num_k, v_b, v_h, v_t, 1, COLS, DV, BLOCK_DV, TMA, UPCAST)
        x = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if i >= whole:
            kp = load_tokens(k_pos, b, s, num_k, kpos_b, 1, COLS, PAD_KEY)
            kd = kp
            if HAS_DOC:
                kd = load_tokens(k_doc, b, s, num_k, kdoc_b, 1, COLS, -2)
            seen = visible(qp[:, None], kp[None, :], qd[:, None], kd[None, :], window, HAS_DOC, HAS_WINDOW)
            x = tl.where(seen, x, float("-inf"))
        acc, m, total = online_softmax(x, v_tile, acc, m, total, scale_log2, True, PRECISION)

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    store_tile(out, acc, 1.0, b, h, t, num_q, o_b, o_h, o_t, PACK, ROWS, DV, BLOCK_DV)
    at, inside = row_offsets(b, h, t, num_q, num_heads, PACK, ROWS)
    value = tl.where(empty, float("-inf"), (m + tl.log2(total)) * LN2)
    tl.store(lse + at, value, mask=inside)
