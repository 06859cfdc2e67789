"""Device functions shared by the Hopper kernels (Gluon): tiles in and out of shared memory, rows' numbers.

Every program is one warpgroup (4 warps); tiles have 64 rows and 64 columns.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from ltrain_kernels.block_sparse.triton_tiles import closed_row, nth_entry

# Rows of a tile by the layouts of scores (64 x 64) and of sums (64 x D).
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
LOG2E = gl.constexpr(1.4426950408889634)

# Names that changed between Triton 3.6 and 3.9.
load_async = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
sync_threads = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def copy_tile(desc, b, h, t, ready, slot, pred=True):
    """Ask for the tile at token t of heads h ... of batch b; `ready` counts its bytes."""
    load_async(desc, [b, h, t, 0], ready, slot, pred=pred)


@gluon.jit
def as_matrix(slot, BLOCK_D: gl.constexpr):
    """A slot [1, heads, tokens, D] as 64 rows of D."""
    return slot.reshape([64, BLOCK_D])


@gluon.jit
def key_tile(
    n, entries, row, first, full, tail, count, local, sinks, stride, residue,
    SPLIT_K: gl.constexpr, CLOSED: gl.constexpr,
):  # fmt: skip
    """First token of the n-th key tile of a row, anything where n is not below `count`."""
    if CLOSED:
        j = closed_row(nth_entry(n // SPLIT_K, first, full, tail), row, local, sinks, stride, residue)
    else:
        j = gl.load(entries + full + n // SPLIT_K, mask=n < count, other=0)
    return (j * SPLIT_K + n % SPLIT_K) * 64


@gluon.jit
def row_places(b, h, t, num_tokens, num_heads, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Where the rows of a query tile lie in a contiguous [B, H, T] tensor, and which of them exist."""
    r = gl.arange(0, 64, layout=LAYOUT)
    base = (b.to(gl.int64) * num_heads + h) * num_tokens + t
    return base + (r // ROWS) * num_tokens + r % ROWS, (t + r % ROWS) < num_tokens


@gluon.jit
def base2(lse):
    """lse in base 2, +inf for a row without keys, so that exp2(score - lse) is 0 there."""
    return gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@gluon.jit
def tokens_of(src, b, t, num_tokens, s_b, ROWS: gl.constexpr, OTHER: gl.constexpr, LAYOUT: gl.constexpr):
    """Per-token integers of the rows of a tile, repeated for each packed head."""
    token = t + gl.arange(0, 64, layout=LAYOUT) % ROWS
    return gl.load(src + b.to(gl.int64) * s_b + token, mask=token < num_tokens, other=OTHER)


@gluon.jit
def opaque(x):
    """x, unknown to the optimiser: what is computed from it stays where it is written. Hoisted out of a loop,
    the addresses of a rare branch would take registers in every iteration."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def places(
    dst, b, h, t, num_tokens, s_b, s_h, s_t,
    ROWS: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Pointers of the tile at token t, and which of its elements exist."""
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, LAYOUT))
    base = dst + b.to(gl.int64) * s_b + h.to(gl.int64) * s_h + t.to(gl.int64) * s_t
    # Within one head 32-bit offsets are enough, and take half the registers.
    at = base + ((r % ROWS)[:, None] * s_t + d[None, :])
    if ROWS != 64:
        at += (r // ROWS)[:, None].to(gl.int64) * s_h
    mask = ((t + r % ROWS) < num_tokens)[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    return at, mask


@gluon.jit
def start_sum(
    dst, scale, b, h, t, num_tokens, s_b, s_h, s_t,
    ROWS: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, ACCUMULATE: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """What a sum starts from: 0, or what is in `dst` (scaled back)."""
    if ACCUMULATE:
        LINES: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
        at, mask = places(dst, b, h, t, num_tokens, s_b, s_h, s_t, ROWS, D, BLOCK_D, LINES)
        x = gl.convert_layout(gl.load(at, mask=mask, other=0.0) / scale, SUMS)
    else:
        x = gl.zeros([64, BLOCK_D], gl.float32, layout=SUMS)
    return x


@gluon.jit
def write_tile(
    dst, x, scale, b, h, t, num_tokens, s_b, s_h, s_t,
    ROWS: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """Write `scale * x` to the tile at token t."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (BLOCK_D // 8), BLOCK_D // 8], [4, 1], [1, 0])
    at, mask = places(dst, b, h, t, num_tokens, s_b, s_h, s_t, ROWS, D, BLOCK_D, LINES)
    gl.store(at, gl.convert_layout((x * scale).to(dst.dtype.element_ty), LINES), mask=mask)
