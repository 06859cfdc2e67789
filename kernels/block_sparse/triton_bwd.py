"""Backward kernels: dQ by sparse rows, dK and dV by sparse columns. Each output tile has one writer: no
atomics.

With P = exp2(c S - lse2) and dS = P (dP - delta): dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO
(arXiv 2307.08691, section 3.1). `lse2` is the row's log-sum-exp in base 2, +inf for a row without keys, so
that P is 0 there; `delta` = rowsum(O dO) - dlse, once for all partial calls on a query shard.
"""

# ruff: noqa: SIM108 - an `if` on a constexpr chooses what is compiled; it reads better as a branch.

from __future__ import annotations

import triton
import triton.language as tl

from ltrain_kernels.block_sparse.triton_tiles import (
    PAD_KEY,
    PAD_QUERY,
    closed_row,
    load_bounds,
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
def attention_delta(
    out, dout, dlse, delta,
    o_b, o_h, o_t, do_b, do_h, do_t, num_q, num_heads,
    ROWS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = sum over DV of out * dout, less dlse: [B, Hq, Tq], fp32."""
    t = tl.program_id(0) * ROWS
    h = tl.program_id(1)
    b = tl.program_id(2)
    o = load_tile(out, b, h, t, num_q, o_b, o_h, o_t, 1, ROWS, DV, BLOCK_DV, False, True)
    do = load_tile(dout, b, h, t, num_q, do_b, do_h, do_t, 1, ROWS, DV, BLOCK_DV, False, True)
    value = tl.sum(o * do, 1)
    r = tl.arange(0, ROWS)
    at = (b.to(tl.int64) * num_heads + h) * num_q + t + r
    inside = (t + r) < num_q
    if HAS_DLSE:
        value -= tl.load(dlse + at, mask=inside, other=0.0)
    tl.store(delta + at, value, mask=inside)


@triton.jit
def attention_dq(
    q, k, v, dout, lse2, delta, dq,
    items, entries, pattern, q_pos, k_pos, q_doc, k_doc,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dq_b, dq_h, dq_t,
    pattern_h, qpos_b, kpos_b, qdoc_b, kdoc_b,
    num_q, num_k, num_heads, scale, scale_log2, window,
    GROUP: tl.constexpr, PACK: tl.constexpr, PER_QUERY_HEAD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT_Q: tl.constexpr, SPLIT_K: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    CLOSED: tl.constexpr, HAS_DOC: tl.constexpr, HAS_WINDOW: tl.constexpr, ACCUMULATE: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write (or add to) dq [B, Tq, Hq, D]; tiles and order as in the forward kernel."""
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
    do_tile = load_tile(dout, b, h, t, num_q, do_b, do_h, do_t, PACK, ROWS, DV, BLOCK_DV, False, UPCAST)
    at, inside = row_offsets(b, h, t, num_q, num_heads, PACK, ROWS)
    row_lse2 = tl.load(lse2 + at, mask=inside, other=float("inf"))
    row_delta = tl.load(delta + at, mask=inside, other=0.0)
    if ACCUMULATE:
        # The sum starts from what is there (scaled back), for a load at the end would need registers beside
        # the sum's.
        acc = load_tile(dq, b, h, t, num_q, dq_b, dq_h, dq_t, PACK, ROWS, D, BLOCK_D, False, True) / scale
    else:
        acc = tl.zeros([PACK * ROWS, BLOCK_D], tl.float32)

    qp = load_tokens(q_pos, b, t, num_q, qpos_b, PACK, ROWS, PAD_QUERY)
    qd = qp
    if HAS_DOC:
        qd = load_tokens(q_doc, b, t, num_q, qdoc_b, PACK, ROWS, -1)
    whole = (tail - full) * SPLIT_K
    for i in tl.range(0, whole + (full - first + last - tail) * SPLIT_K):
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
        p = tl.exp2(x * scale_log2 - row_lse2[:, None])
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = p * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    store_tile(dq, acc, scale, b, h, t, num_q, dq_b, dq_h, dq_t, PACK, ROWS, D, BLOCK_D)


@triton.jit
def attention_dkdv(
    q, k, v, dout, lse2, delta, dk, dv,
    items, bounds, entries, q_pos, k_pos, q_doc, k_doc,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, do_b, do_h, do_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    bounds_b, bounds_h, qpos_b, kpos_b, qdoc_b, kdoc_b,
    num_q, num_k, num_heads, scale, scale_log2, window,
    GROUP: tl.constexpr, PACK: tl.constexpr, PER_QUERY_HEAD: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT_Q: tl.constexpr, SPLIT_K: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    CLOSED: tl.constexpr, HAS_DOC: tl.constexpr, HAS_WINDOW: tl.constexpr, ACCUMULATE: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write (or add to) dk [B, Tk, Hkv, D] and dv [B, Tk, Hkv, DV].

    One program holds COLS keys of one kv head and streams the query tiles of all the group's heads: where the
    group shares its lists, in one flat loop of (entries x tiles of the row x head packs), else head after
    head. In closed form the rows that see a column are consecutive: entry n is row n.
    """
    LISTS: tl.constexpr = GROUP if PER_QUERY_HEAD else 1
    PACKS: tl.constexpr = 1 if PER_QUERY_HEAD else GROUP // PACK
    TILES: tl.constexpr = SPLIT_Q * PACKS
    pid = tl.program_id(0)
    b, kv, column, first, full, tail, last = load_item(items, pid // SPLIT_K)
    s = column * (SPLIT_K * COLS) + (pid % SPLIT_K) * COLS
    k_tile = load_tile(k, b, kv, s, num_k, k_b, k_h, k_t, 1, COLS, D, BLOCK_D, False, UPCAST)
    v_tile = load_tile(v, b, kv, s, num_k, v_b, v_h, v_t, 1, COLS, DV, BLOCK_DV, False, UPCAST)
    if ACCUMULATE:
        dk_acc = load_tile(dk, b, kv, s, num_k, dk_b, dk_h, dk_t, 1, COLS, D, BLOCK_D, False, True) / scale
        dv_acc = load_tile(dv, b, kv, s, num_k, dv_b, dv_h, dv_t, 1, COLS, DV, BLOCK_DV, False, True)
    else:
        dk_acc = tl.zeros([COLS, BLOCK_D], tl.float32)
        dv_acc = tl.zeros([COLS, BLOCK_DV], tl.float32)
    for g in range(LISTS):
        if PER_QUERY_HEAD:
            first, full, tail, last = load_bounds(bounds, b, kv * GROUP + g, column, bounds_b, bounds_h)
        whole = (tail - full) * TILES
        for i in tl.range(0, whole + (full - first + last - tail) * TILES):
            if CLOSED:
                row = nth_entry(i // TILES, first, full, tail)
            else:
                row = tl.load(entries + full + i // TILES)
            h = kv * GROUP + (g if PER_QUERY_HEAD else (i % PACKS) * PACK)
            t = (row * SPLIT_Q + (i % TILES) // PACKS) * ROWS
            q_tile = load_tile(q, b, h, t, num_q, q_b, q_h, q_t, PACK, ROWS, D, BLOCK_D, TMA, UPCAST)
            do_tile = load_tile(dout, b, h, t, num_q, do_b, do_h, do_t, PACK, ROWS, DV, BLOCK_DV, TMA, UPCAST)
            at, inside = row_offsets(b, h, t, num_q, num_heads, PACK, ROWS)
            x = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            if i >= whole:
                kp = load_tokens(k_pos, b, s, num_k, kpos_b, 1, COLS, PAD_KEY)
                kd = kp
                qp = load_tokens(q_pos, b, t, num_q, qpos_b, PACK, ROWS, PAD_QUERY)
                qd = qp
                if HAS_DOC:
                    kd = load_tokens(k_doc, b, s, num_k, kdoc_b, 1, COLS, -2)
                    qd = load_tokens(q_doc, b, t, num_q, qdoc_b, PACK, ROWS, -1)
                seen = visible(
                    qp[None, :], kp[:, None], qd[None, :], kd[:, None], window, HAS_DOC, HAS_WINDOW
                )
                x = tl.where(seen, x, float("-inf"))
            row_lse2 = tl.load(lse2 + at, mask=inside, other=float("inf"))
            p = tl.exp2(x * scale_log2 - row_lse2[None, :])
            dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision=PRECISION)
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
            row_delta = tl.load(delta + at, mask=inside, other=0.0)
            ds = p * (dp - row_delta[None, :])
            dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=PRECISION)
    store_tile(dk, dk_acc, scale, b, kv, s, num_k, dk_b, dk_h, dk_t, 1, COLS, D, BLOCK_D)
    store_tile(dv, dv_acc, 1.0, b, kv, s, num_k, dv_b, dv_h, dv_t, 1, COLS, DV, BLOCK_DV)
