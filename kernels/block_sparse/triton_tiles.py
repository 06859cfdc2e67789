"""Device functions shared by the forward and backward kernels: where a tile lies, how it is loaded, what it
may see.

A *work item* is (batch, list head, sparse row or column); the table `items` holds them longest first, each
with four numbers, its *bounds*: entries [b1, b2) are full blocks (no mask), [b0, b1) and [b2, b3) are partial
ones. Entry n is block `entries[n]` where lists are stored, and a closed form of n where they are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A padded key is later than every query, a padded query earlier than every key: padding needs no mask of its
# own.
PAD_KEY = tl.constexpr(2147483647)
PAD_QUERY = tl.constexpr(-1)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_item(items, rank):
    """Work item of this rank -> batch, list head, line (sparse row or column), and its four bounds."""
    at = items + rank * 8
    b, head, line = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    return b, head, line, tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)


@triton.jit
def load_bounds(bounds, b, h, line, s_b, s_h):
    """The four bounds of a line of one list head."""
    at = bounds + b.to(tl.int64) * s_b + h.to(tl.int64) * s_h + line.to(tl.int64) * 4
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def load_pattern(pattern, h, s_h):
    """Closed-form parameters of a head: local blocks, sink blocks, stride (0: none), residue."""
    at = pattern + h * s_h
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def nth_entry(n, first, full, tail):
    """n-th entry of an item in the order of work: the full ones [full, tail), then [first, full), then from
    `tail`."""
    n += full
    return tl.where(n < tail, n, tl.where(n < tail + full - first, n - tail + first, n - full + first))


@triton.jit
def closed_row(n, row, local, sinks, stride, residue):
    """n-th visible block of a row: the sinks, then the strided blocks, then the local band, ascending."""
    band = tl.maximum(row - local + 1, 0)
    first = tl.minimum(sinks, band)
    step = tl.maximum(stride, 1)
    start = first + (residue - first % step + step) % step
    strided = tl.where(stride > 0, tl.maximum((band - start + step - 1) // step, 0), 0)
    far = tl.where(n < first, n, start + (n - first) * step)
    return tl.where(n < first + strided, far, band + n - first - strided)


@triton.jit
def load_tile(
    src, b, h, t, num_tokens, s_b, s_h, s_t,
    HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tokens [t, t + ROWS) of heads [h, h + HEADS) as [HEADS * ROWS, BLOCK_D], zero beyond the tensor."""
    if TMA:
        x = src.load([b, h, t, 0]).reshape(HEADS * ROWS, BLOCK_D)
    else:
        r = tl.arange(0, HEADS * ROWS)
        d = tl.arange(0, BLOCK_D)
        base = src + b.to(tl.int64) * s_b + h.to(tl.int64) * s_h + t.to(tl.int64) * s_t
        at = base + (r // ROWS)[:, None].to(tl.int64) * s_h + (r % ROWS)[:, None] * s_t + d[None, :]
        mask = ((t + r % ROWS) < num_tokens)[:, None]
        if BLOCK_D != D:
            mask = mask & (d < D)[None, :]
        x = tl.load(at, mask=mask, other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_tile(
    dst, x, scale, b, h, t, num_tokens, s_b, s_h, s_t,
    HEADS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write `scale * x` where `load_tile` would read."""
    r = tl.arange(0, HEADS * ROWS)
    d = tl.arange(0, BLOCK_D)
    base = dst + b.to(tl.int64) * s_b + h.to(tl.int64) * s_h + t.to(tl.int64) * s_t
    # Within one head 32-bit offsets are enough, and take half the registers.
    at = base + ((r % ROWS)[:, None] * s_t + d[None, :])
    if HEADS > 1:
        at += (r // ROWS)[:, None].to(tl.int64) * s_h
    mask = ((t + r % ROWS) < num_tokens)[:, None]
    if BLOCK_D != D:
        mask = mask & (d < D)[None, :]
    tl.store(at, (x * scale).to(dst.dtype.element_ty), mask=mask)


@triton.jit
def row_offsets(b, h, t, num_tokens, num_heads, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Where the rows of a query tile lie in a contiguous [B, H, T] tensor, and which of them exist."""
    r = tl.arange(0, HEADS * ROWS)
    at = (b.to(tl.int64) * num_heads + h + r // ROWS) * num_tokens + t + r % ROWS
    return at, (t + r % ROWS) < num_tokens


@triton.jit
def load_tokens(src, b, t, num_tokens, s_b, HEADS: tl.constexpr, ROWS: tl.constexpr, OTHER: tl.constexpr):
    """Per-token integers (positions, documents) of the rows of a tile, repeated for each packed head."""
    token = t + tl.arange(0, HEADS * ROWS) % ROWS
    return tl.load(src + b.to(tl.int64) * s_b + token, mask=token < num_tokens, other=OTHER)


@triton.jit
def visible(q_pos, k_pos, q_doc, k_doc, window, HAS_DOC: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Token mask of a partial block; the arguments are shaped to broadcast."""
    seen = q_pos >= k_pos
    if HAS_DOC:
        seen = seen & (q_doc == k_doc)
    if HAS_WINDOW:
        # Written without k_pos - window, which overflows for padded keys; those fail the first test anyway.
        seen = seen & (q_pos - window < k_pos)
    return seen
