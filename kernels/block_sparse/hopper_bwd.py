"""Backward kernels for Hopper (sm_90), 16-bit inputs: the sums of `triton_bwd` with the pipeline written out.

One warpgroup holds 64 queries (or keys) and streams tiles of 64 of the other side through two slots of shared
memory. What the Triton pipeliner doesn't do, and what these are for:

- the next tile is asked for as soon as the slot before is read, most of an iteration ahead; with two stages
  the pipeliner asks at the end of an iteration and waits at the start of the next;
- dP = dO V^T runs while exp2 does, and dV += P^T dO while dS is computed: a multiplication is waited for only
  where its result is used, so that the matrix units always hold the next one.

Two programs share a multiprocessor and fill each other's gaps (FlashAttention-3, arXiv 2407.08608, section
3, has two warpgroups of one program for that). Conventions, bounds and results: `triton_bwd`.
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
    base2,
    copy_tile,
    key_tile,
    opaque,
    row_places,
    start_sum,
    sync_threads,
    tokens_of,
    write_tile,
)
from ltrain_kernels.block_sparse.triton_tiles import (
    PAD_KEY,
    PAD_QUERY,
    load_bounds,
    load_item,
    load_pattern,
    nth_entry,
    visible,
)


@gluon.jit
def attention_dq_hopper(
    q, k, v, dout, lse, delta, dq,
    items, entries, pattern, q_pos, k_pos, q_doc, k_doc,
    dq_b, dq_h, dq_t, pattern_h, qpos_b, kpos_b, qdoc_b, kdoc_b,
    num_q, num_k, num_heads, scale, scale_log2, window,
    GROUP: gl.constexpr, PACK: gl.constexpr, PER_QUERY_HEAD: gl.constexpr,
    ROWS: gl.constexpr, SPLIT_Q: gl.constexpr, SPLIT_K: gl.constexpr,
    D: gl.constexpr, BLOCK_D: gl.constexpr,
    CLOSED: gl.constexpr, HAS_DOC: gl.constexpr, HAS_WINDOW: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Write (or add to) dq [B, Tq, Hq, D]; q, k, v and dout are descriptors of [B, H, T, D]."""
    GROUPS: gl.constexpr = 1 if PER_QUERY_HEAD else GROUP // PACK
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    COL: gl.constexpr = gl.SliceLayout(0, SCORES)
    DTYPE: gl.constexpr = q.dtype
    # Of two tiles.
    BYTES: gl.constexpr = 2 * 64 * BLOCK_D * 2

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
    acc = start_sum(dq, scale, b, h, t, num_q, dq_b, dq_h, dq_t, ROWS, D, BLOCK_D, ACCUMULATE, SUMS)

    q_slot = gl.allocate_shared_memory(DTYPE, [1, PACK, ROWS, BLOCK_D], q.layout)
    do_slot = gl.allocate_shared_memory(DTYPE, [1, PACK, ROWS, BLOCK_D], q.layout)
    k_slots = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, BLOCK_D], k.layout)
    v_slots = gl.allocate_shared_memory(DTYPE, [2, 1, 1, 64, BLOCK_D], k.layout)
    # Barriers of the two slots, and of the tiles that stay.
    ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(3):
        mbarrier.init(ready.index(n), count=1)
    sync_threads()
    # The assembler keeps multiplications in flight only where no path defines their sums otherwise: a row
    # without entries goes around the loop and the wait at its end.
    if count > 0:
        mbarrier.expect(ready.index(2), BYTES)
        copy_tile(q, b, h, t, ready.index(2), q_slot)
        copy_tile(dout, b, h, t, ready.index(2), do_slot)
        s = key_tile(
            0, entries, row, first, full, tail, count, local, sinks, stride, residue, SPLIT_K, CLOSED
        )
        mbarrier.expect(ready.index(0), BYTES)
        copy_tile(k, b, kv, s, ready.index(0), k_slots.index(0))
        copy_tile(v, b, kv, s, ready.index(0), v_slots.index(0))
        at, inside = row_places(b, h, t, num_q, num_heads, ROWS, ROW)
        row_lse = base2(gl.load(lse + at, mask=inside, other=float("-inf")))
        row_delta = gl.load(delta + at, mask=inside, other=0.0)
        qp = tokens_of(q_pos, b, t, num_q, qpos_b, ROWS, PAD_QUERY, ROW)
        qd = qp
        if HAS_DOC:
            qd = tokens_of(q_doc, b, t, num_q, qdoc_b, ROWS, -1, ROW)
        q_tile, do_tile = as_matrix(q_slot, BLOCK_D), as_matrix(do_slot, BLOCK_D)
        zero = gl.zeros([64, 64], gl.float32, layout=SCORES)
        acc_going = warpgroup_mma_init(acc)
        mbarrier.wait(ready.index(2), 0)
        for i in range(count):
            slot = i % 2
            m = i + 1
            # Where the next tile lies, found out before anything is waited for.
            ahead = key_tile(
                m, entries, row, first, full, tail, count, local, sinks, stride, residue, SPLIT_K, CLOSED
            )
            k_tile, v_tile = as_matrix(k_slots.index(slot), BLOCK_D), as_matrix(v_slots.index(slot), BLOCK_D)
            mbarrier.wait(ready.index(slot), (i // 2) % 2)
            x_going = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp_going = warpgroup_mma(do_tile, v_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            # The scores are there, and the sum of the iteration before: the other slot is free.
            x = warpgroup_mma_wait(1, deps=[x_going])
            sync_threads()
            mbarrier.expect(ready.index(1 - slot), BYTES, pred=m < count)
            copy_tile(k, b, kv, ahead, ready.index(1 - slot), k_slots.index(1 - slot), m < count)
            copy_tile(v, b, kv, ahead, ready.index(1 - slot), v_slots.index(1 - slot), m < count)
            if i >= whole:
                kp = tokens_of(k_pos, b, s, num_k, kpos_b, 64, PAD_KEY, COL)
                kd = kp
                if HAS_DOC:
                    kd = tokens_of(k_doc, b, s, num_k, kdoc_b, 64, -2, COL)
                seen = visible(
                    qp[:, None], kp[None, :], qd[:, None], kd[None, :], window, HAS_DOC, HAS_WINDOW
                )
                x = gl.where(seen, x, float("-inf"))
            p = gl.exp2(x * scale_log2 - row_lse[:, None])
            dp = warpgroup_mma_wait(0, deps=[dp_going])
            ds = (p * (dp - row_delta[:, None])).to(DTYPE)
            ds = gl.convert_layout(ds, gl.DotOperandLayout(0, SUMS, 2))
            acc_going = warpgroup_mma(ds, k_tile, acc_going, is_async=True)
            s = ahead
        acc = warpgroup_mma_wait(0, deps=[acc_going])
    write_tile(dq, acc, scale, b, h, t, num_q, dq_b, dq_h, dq_t, ROWS, D, BLOCK_D)


@gluon.jit
def query_tile(
    n, kv, g, entries, first, full, tail, count,
    GROUP: gl.constexpr, PACK: gl.constexpr, PACKS: gl.constexpr, ROWS: gl.constexpr, SPLIT_Q: gl.constexpr,
    CLOSED: gl.constexpr,
):  # fmt: skip
    """First head and first token of the n-th query tile of a column.

    Full blocks are walked from the last row back: the long columns that run together then read the same
    queries at the same time, and the second-level cache serves all but one of them.
    """
    TILES: gl.constexpr = SPLIT_Q * PACKS
    whole = (tail - full) * TILES
    n = gl.where(n < whole, whole - 1 - n, n)
    if CLOSED:
        row = nth_entry(n // TILES, first, full, tail)
    else:
        row = gl.load(entries + full + n // TILES, mask=n < count, other=0)
    h = kv * GROUP + g + (n % PACKS) * PACK
    return h, (row * SPLIT_Q + (n % TILES) // PACKS) * ROWS


@gluon.jit
def load_stats(lse, delta, b, h, t, num_tokens, num_heads, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """lse (base 2) of a tile's rows and then their delta, as one vector: a value a thread, to be shared."""
    e = gl.arange(0, 128, layout=LAYOUT)
    r = e % 64
    token = t + r % ROWS
    at = (b.to(gl.int64) * num_heads + h + r // ROWS) * num_tokens + token
    x = gl.load(gl.where(e < 64, lse + at, delta + at), mask=token < num_tokens, other=float("-inf"))
    return gl.where(e < 64, base2(x), gl.where(token < num_tokens, x, 0.0))


@gluon.jit
def attention_dkdv_hopper(
    q, k, v, dout, lse, delta, dk, dv,
    items, bounds, entries, q_pos, k_pos, q_doc, k_doc,
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t, bounds_b, bounds_h, qpos_b, kpos_b, qdoc_b, kdoc_b,
    num_q, num_k, num_heads, scale, scale_log2, window,
    GROUP: gl.constexpr, PACK: gl.constexpr, PER_QUERY_HEAD: gl.constexpr,
    ROWS: gl.constexpr, SPLIT_Q: gl.constexpr, SPLIT_K: gl.constexpr,
    D: gl.constexpr, BLOCK_D: gl.constexpr,
    CLOSED: gl.constexpr, HAS_DOC: gl.constexpr, HAS_WINDOW: gl.constexpr, ACCUMULATE: gl.constexpr,
):  # fmt: skip
    """Write (or add to) dk and dv [B, Tk, Hkv, D]; q, k, v and dout are descriptors of [B, H, T, D]."""
    LISTS: gl.constexpr = GROUP if PER_QUERY_HEAD else 1
    PACKS: gl.constexpr = 1 if PER_QUERY_HEAD else GROUP // PACK
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, SCORES)
    COL: gl.constexpr = gl.SliceLayout(1, SCORES)
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    DTYPE: gl.constexpr = q.dtype
    # Of two tiles.
    BYTES: gl.constexpr = 2 * 64 * BLOCK_D * 2

    pid = gl.program_id(0)
    b, kv, column, first, full, tail, last = load_item(items, pid // SPLIT_K)
    s = (column * SPLIT_K + pid % SPLIT_K) * 64
    dk_sum = start_sum(dk, scale, b, kv, s, num_k, dk_b, dk_h, dk_t, 64, D, BLOCK_D, ACCUMULATE, SUMS)
    dv_sum = start_sum(dv, 1.0, b, kv, s, num_k, dv_b, dv_h, dv_t, 64, D, BLOCK_D, ACCUMULATE, SUMS)
    k_slot = gl.allocate_shared_memory(DTYPE, [1, 1, 64, BLOCK_D], k.layout)
    v_slot = gl.allocate_shared_memory(DTYPE, [1, 1, 64, BLOCK_D], k.layout)
    q_slots = gl.allocate_shared_memory(DTYPE, [2, 1, PACK, ROWS, BLOCK_D], q.layout)
    do_slots = gl.allocate_shared_memory(DTYPE, [2, 1, PACK, ROWS, BLOCK_D], q.layout)
    # lse and delta of the tile in each slot: held by every thread they would take 32 registers.
    stats = gl.allocate_shared_memory(gl.float32, [2, 128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # Barriers of the two slots, and of the tiles that stay.
    ready = gl.allocate_shared_memory(gl.int64, [3, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(3):
        mbarrier.init(ready.index(n), count=1)
    sync_threads()
    mbarrier.expect(ready.index(2), BYTES)
    copy_tile(k, b, kv, s, ready.index(2), k_slot)
    copy_tile(v, b, kv, s, ready.index(2), v_slot)
    k_tile, v_tile = as_matrix(k_slot, BLOCK_D), as_matrix(v_slot, BLOCK_D)
    zero = gl.zeros([64, 64], gl.float32, layout=SCORES)
    mbarrier.wait(ready.index(2), 0)
    # Tiles of all lists so far: their number tells the slot and the phase of its barrier.
    done = 0
    for g in range(LISTS):
        if PER_QUERY_HEAD:
            first, full, tail, last = load_bounds(bounds, b, kv * GROUP + g, column, bounds_b, bounds_h)
        whole = (tail - full) * (SPLIT_Q * PACKS)
        count = whole + (full - first + last - tail) * (SPLIT_Q * PACKS)
        # As in dq.
        if count > 0:
            # Slower warps may still read the slots of the list before.
            sync_threads()
            h, t = query_tile(
                0, kv, g, entries, first, full, tail, count, GROUP, PACK, PACKS, ROWS, SPLIT_Q, CLOSED
            )
            mbarrier.expect(ready.index(done % 2), BYTES)
            copy_tile(q, b, h, t, ready.index(done % 2), q_slots.index(done % 2))
            copy_tile(dout, b, h, t, ready.index(done % 2), do_slots.index(done % 2))
            stats.index(done % 2).store(load_stats(lse, delta, b, h, t, num_q, num_heads, ROWS, FLAT))
            dk_going = warpgroup_mma_init(dk_sum)
            dv_going = warpgroup_mma_init(dv_sum)
            for i in range(count):
                slot = (done + i) % 2
                m = i + 1
                # Where the next tile lies, found out before anything is waited for.
                next_h, next_t = query_tile(
                    m, kv, g, entries, first, full, tail, count, GROUP, PACK, PACKS, ROWS, SPLIT_Q, CLOSED
                )
                next_stats = load_stats(lse, delta, b, next_h, next_t, num_q, num_heads, ROWS, FLAT)
                q_tile = as_matrix(q_slots.index(slot), BLOCK_D)
                do_tile = as_matrix(do_slots.index(slot), BLOCK_D)
                mbarrier.wait(ready.index(slot), ((done + i) // 2) % 2)
                x_going = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
                dp_going = warpgroup_mma(v_tile, do_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
                # The scores are there, and the sums of the iteration before: the other slot is free.
                x = warpgroup_mma_wait(1, deps=[x_going])
                sync_threads()
                mbarrier.expect(ready.index(1 - slot), BYTES, pred=m < count)
                copy_tile(q, b, next_h, next_t, ready.index(1 - slot), q_slots.index(1 - slot), m < count)
                copy_tile(dout, b, next_h, next_t, ready.index(1 - slot), do_slots.index(1 - slot), m < count)
                if i >= whole:
                    own = opaque(s)
                    kp = tokens_of(k_pos, b, own, num_k, kpos_b, 64, PAD_KEY, COL)
                    kd = kp
                    qp = tokens_of(q_pos, b, t, num_q, qpos_b, ROWS, PAD_QUERY, ROW)
                    qd = qp
                    if HAS_DOC:
                        kd = tokens_of(k_doc, b, own, num_k, kdoc_b, 64, -2, COL)
                        qd = tokens_of(q_doc, b, t, num_q, qdoc_b, ROWS, -1, ROW)
                    seen = visible(
                        qp[None, :], kp[:, None], qd[None, :], kd[:, None], window, HAS_DOC, HAS_WINDOW
                    )
                    x = gl.where(seen, x, float("-inf"))
                p = gl.exp2(x * scale_log2 - stats.index(slot).slice(0, 64).load(ROW)[None, :])
                weights = gl.convert_layout(p.to(DTYPE), gl.DotOperandLayout(0, SUMS, 2))
                dv_going = warpgroup_mma(weights, do_tile, dv_going, is_async=True)
                row_delta = stats.index(slot).slice(64, 64).load(ROW)
                stats.index(1 - slot).store(next_stats)
                dp = warpgroup_mma_wait(1, deps=[dp_going])
                ds = (p * (dp - row_delta[None, :])).to(DTYPE)
                ds = gl.convert_layout(ds, gl.DotOperandLayout(0, SUMS, 2))
                dk_going = warpgroup_mma(ds, q_tile, dk_going, is_async=True)
                h = next_h
                t = next_t
            dk_sum, dv_sum = warpgroup_mma_wait(0, deps=[dk_going, dv_going])
        done += count
    write_tile(dk, dk_sum, scale, b, kv, s, num_k, dk_b, dk_h, dk_t, 64, D, BLOCK_D)
    write_tile(dv, dv_sum, 1.0, b, kv, s, num_k, dv_b, dv_h, dv_t, 64, D, BLOCK_D)
