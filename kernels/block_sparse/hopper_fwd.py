"""Forward kernel for Hopper (sm_90), 16-bit inputs: `triton_fwd` with the pipeline written out.

The scores of the next tile are multiplied before the values of this one, so that its softmax runs while the
matrix units work on the values (FlashAttention-3, arXiv 2407.08608, section 3.2). Three programs of one
warpgroup share a multiprocessor: they have three slots of shared memory each, where the values of a tile take
the place of its keys.
"""

# ruff: noqa: SIM108 - an `if` on a constexpr chooses what is compiled; it reads better as a branch.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ltrain_kernels.block_sparse.hopper_tiles import (
    SCORES,
    as_matrix,
    copy_tile,
    key_tile,
    row_places,
    sync_threads,
    tokens_of,
    write_tile,
)
from ltrain_kernels.block_sparse.triton_tiles import (
    LN2,
    PAD_KEY,
    PAD_QUERY,
    load_item,
    load_pattern,
    visible,
)


@gluon.jit
def mask_scores(
    x, qp, qd, k_pos, k_doc, b, s, num_k, kpos_b, kdoc_b, window,
    HAS_DOC: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Scores of the keys from token s on, -inf where a query doesn't see the key."""
    COL: gl.constexpr = gl.SliceLayout(0, SCORES)
    kp = tokens_of(k_pos, b, s, num_k, kpos_b, 64, PAD_KEY, COL)
    kd = kp
    if HAS_DOC:
        kd = tokens_of(k_doc, b, s, num_k, kdoc_b, 64, -2, COL)
    seen = visible(qp[:, None], kp[None, :], qd[:, None], kd[None, :], window, HAS_DOC, HAS_WINDOW)
    return gl.where(seen, x, float("-inf"))


@gluon.jit
def attention_forward_hopper(
    q, k, v, out, lse,
    items, entries, pattern, q_pos, k_pos, q_doc, k_doc,
    o_b, o_h, o_t, pattern_h, qpos_b, kpos_b, qdoc_b, kdoc_b,
    num_q, num_k, num_heads, scale_log2, window,
    GROUP: gl.constexpr, PACK: gl.constexpr, PER_QUERY_HEAD: gl.constexpr,
    ROWS: gl.constexpr, SPLIT_Q: gl.constexpr, SPLIT_K: gl.constexpr,
    D: gl.constexpr, BLOCK_D: gl.constexpr,
    CLOSED: gl.constexpr, HAS_DOC: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Write out [B, Tq, Hq, D] and lse [B, Hq, Tq]; q, k and v are descriptors of [B, H, T, D]."""
    GROUPS: gl.constexpr = 1 if PER_QUERY_HEAD else GROUP // PACK
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    DTYPE: gl.constexpr = q.dtype
    # Of a tile.
    BYTES: gl.constexpr = 64 * BLOCK_D * 2

    pid = gl.program_id(0)
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
    whole = (tail - full) * SPLIT_K
    count = whole + (full - first + last - tail) * SPLIT_K

    q_slot = gl.allocate_shared_memory(DTYPE, [1, PACK, ROWS, BLOCK_D], q.layout)
    slots = gl.allocate_shared_memory(DTYPE, [3, 1, 1, 64, BLOCK_D], k.layout)
    # Barriers of the slots, and of the queries. A slot takes keys in even phases and values in odd ones.
    ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(4):
        mbarrier.init(ready.index(slot), count=1)
    sync_threads()
    acc = gl.zeros([64, BLOCK_D], gl.float32, layout=SUMS)
    m = gl.full([64], float("-inf"), gl.float32, layout=ROW)
    total = gl.zeros([64], gl.float32, layout=ROW)
    if count > 0:
        mbarrier.expect(ready.index(3), BYTES)
        copy_tile(q, b, h, t, ready.index(3), q_slot)
        s = key_tile(
            0, entries, row, first, full, tail, count, local, sinks, stride, residue, SPLIT_K, CLOSED
        )
        mbarrier.expect(ready.index(0), BYTES)
        copy_tile(k, b, kv, s, ready.index(0), slots.index(0))
        s1 = key_tile(
            1, entries, row, first, full, tail, count, local, sinks, stride, residue, SPLIT_K, CLOSED
        )
        mbarrier.expect(ready.index(1), BYTES, pred=count > 1)
        copy_tile(k, b, kv, s1, ready.index(1), slots.index(1), count > 1)
        s2 = key_tile(
            2, entries, row, first, full, tail, count, local, sinks, stride, residue, SPLIT_K, CLOSED
        )
        mbarrier.expect(ready.index(2), BYTES, pred=count > 2)
        copy_tile(k, b, kv, s2, ready.index(2), slots.index(2), count > 2)
        qp = tokens_of(q_pos, b, t, num_q, qpos_b, ROWS, PAD_QUERY, ROW)
        qd = qp
        if HAS_DOC:
            qd = tokens_of(q_doc, b, t, num_q, qdoc_b, ROWS, -1, ROW)
        q_tile = as_matrix(q_slot, BLOCK_D)
        zero = gl.zeros([64, 64], gl.float32, layout=SCORES)
        mbarrier.wait(ready.index(3), 0)
        mbarrier.wait(ready.index(0), 0)
        k_tile = as_matrix(slots.index(0), BLOCK_D)
        x_going = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        x = warpgroup_mma_wait(0, deps=[x_going])
        sync_threads()
        mbarrier.expect(ready.index(0), BYTES)
        copy_tile(v, b, kv, s, ready.index(0), slots.index(0))
        if whole == 0:
            x = mask_scores(x, qp, qd, k_pos, k_doc, b, s, num_k, kpos_b, kdoc_b, window, HAS_DOC, HAS_WINDOW)
        m = gl.max(x, 1) * scale_log2
        # Shifting a row that has seen nothing by 0 avoids (-inf) - (-inf).
        shift = gl.where(m == float("-inf"), 0.0, m)
        p = gl.exp2(x * scale_log2 - shift[:, None])
        total = gl.sum(p, 1)
        weights = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, SUMS, 2))
        acc_going = warpgroup_mma_init(acc)
        for i in range(count - 1):
            n = i + 1
            s3 = key_tile(
                i + 3, entries, row, first, full, tail, count, local, sinks, stride, residue, SPLIT_K, CLOSED
            )
            k_tile = as_matrix(slots.index(n % 3), BLOCK_D)
            mbarrier.wait(ready.index(n % 3), 0)
            x_going = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(ready.index(i % 3), 1)
            acc_going = warpgroup_mma(
                weights, as_matrix(slots.index(i % 3), BLOCK_D), acc_going, is_async=True
            )
            x = warpgroup_mma_wait(1, deps=[x_going])
            sync_threads()
            mbarrier.expect(ready.index(n % 3), BYTES)
            copy_tile(v, b, kv, s1, ready.index(n % 3), slots.index(n % 3))
            if n >= whole:
                x = mask_scores(
                    x, qp, qd, k_pos, k_doc, b, s1, num_k, kpos_b, kdoc_b, window, HAS_DOC, HAS_WINDOW
                )
            m_new = gl.maximum(m, gl.max(x, 1) * scale_log2)
            shift = gl.where(m_new == float("-inf"), 0.0, m_new)
            p = gl.exp2(x * scale_log2 - shift[:, None])
            old = gl.exp2(m - shift)
            total = total * old + gl.sum(p, 1)
            m = m_new
            acc = warpgroup_mma_wait(0, deps=[acc_going])
            weights = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, SUMS, 2))
            sync_threads()
            mbarrier.expect(ready.index(i % 3), BYTES, pred=i + 3 < count)
            copy_tile(k, b, kv, s3, ready.index(i % 3), slots.index(i % 3), i + 3 < count)
            acc_going = warpgroup_mma_init(acc * gl.convert_layout(old, gl.SliceLayout(1, SUMS))[:, None])
            s1 = s2
            s2 = s3
        z = count - 1
        mbarrier.wait(ready.index(z % 3), 1)
        acc_going = warpgroup_mma(weights, as_matrix(slots.index(z % 3), BLOCK_D), acc_going, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc_going])

    empty = total == 0.0
    at, inside = row_places(b, h, t, num_q, num_heads, ROWS, ROW)
    gl.store(lse + at, gl.where(empty, float("-inf"), (m + gl.log2(total)) * LN2), mask=inside)
    divisor = gl.convert_layout(gl.where(empty, 1.0, total), gl.SliceLayout(1, SUMS))
    write_tile(out, acc / divisor[:, None], 1.0, b, h, t, num_q, o_b, o_h, o_t, ROWS, D, BLOCK_D)
