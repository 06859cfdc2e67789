"""Block-sparse attention on a GPU: tensors and a plan in, kernel launches out. Autograd is in `api`.

Shape legend: B batch, T tokens, H query heads, K kv heads, D head size of q and k, V head size of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia import hopper
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ltrain_kernels.block_sparse.hopper_bwd import attention_dkdv_hopper, attention_dq_hopper
from ltrain_kernels.block_sparse.hopper_fwd import attention_forward_hopper
from ltrain_kernels.block_sparse.plan import Plan
from ltrain_kernels.block_sparse.triton_bwd import attention_delta, attention_dkdv, attention_dq
from ltrain_kernels.block_sparse.triton_config import (
    KernelName,
    Tile,
    TileKey,
    choose_tile,
    power_of_two_divisor,
)
from ltrain_kernels.block_sparse.triton_fwd import attention_forward
from ltrain_kernels.block_sparse.triton_index import Launch, Lines, launch_of
from ltrain_kernels.errors import require

LOG2E = 1.4426950408889634
GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
INTERPRETED = isinstance(attention_forward, InterpretedFunction)


@dataclass(frozen=True)
class _Geometry:
    tile: Tile
    pack: int
    rows: int
    split_q: int
    split_k: int
    block_d: int
    block_v: int

    @property
    def explicit(self) -> bool:
        """Whether the kernels with a written-out pipeline take this tile."""
        square = self.pack * self.rows == self.tile.cols == 64
        return self.tile.explicit and square and self.block_d == self.block_v and not INTERPRETED


def _capability(x: Tensor) -> int:
    if INTERPRETED:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor


def geometry(
    kernel: KernelName, arch: int, bits: int, group: int, head_dim: int, value_dim: int, launch: Launch,
    tile: Tile | None = None,
) -> _Geometry:  # fmt: skip
    """Tile of a kernel for this call and how index blocks split over it; `tile` overrides the table (for
    tuning)."""
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_v = max(16, triton.next_power_of_2(value_dim))
    most_pack = 1 if launch.per_query_head else power_of_two_divisor(group, 128)
    most_rows = power_of_two_divisor(launch.block_q, 128)
    if tile is None:
        key = TileKey(
            kernel, arch, bits, max(block_d, block_v), min(most_rows * most_pack, 128),
            power_of_two_divisor(launch.block_k, 128),
        )  # fmt: skip
        tile = choose_tile(key)
    rows = min(most_rows, tile.rows)
    pack = min(most_pack, tile.rows // rows)
    return _Geometry(tile, pack, rows, launch.block_q // rows, launch.block_k // tile.cols, block_d, block_v)


def _use_descriptors(arch: int, *tensors: Tensor) -> bool:
    """Whether every tensor can be read by the bulk copy engine: sm_90, 16-byte aligned base and strides."""

    def aligned(x: Tensor) -> bool:
        strides = [s for s, n in zip(x.stride()[:-1], x.shape[:-1], strict=True) if n > 1]
        return x.data_ptr() % 16 == 0 and all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)

    return arch >= 90 and all(aligned(x) for x in tensors)


def _head_major(x: Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of x [B, T, H, D] seen as [B, H, T, D]: bounds then end at the head's last token."""
    shape = [x.shape[0], x.shape[2], x.shape[1], x.shape[3]]
    # The stride of an axis of one element is never used, but the copy engine wants it aligned.
    strides = [
        s if n > 1 else 128 for s, n in zip((x.stride(0), x.stride(2), x.stride(1)), shape, strict=False)
    ]
    return shape, [*strides, 1]


def _descriptor(x: Tensor, heads: int, rows: int, block_d: int) -> TensorDescriptor:
    return TensorDescriptor(x, *_head_major(x), [1, heads, rows, block_d])


def _gluon_descriptor(x: Tensor, heads: int, rows: int, block_d: int) -> hopper.TensorDescriptor:
    box = [1, heads, rows, block_d]
    layout = gl.NVMMASharedLayout.get_default_for(box, GLUON_TYPES[x.dtype])
    return hopper.TensorDescriptor(x, *_head_major(x), box, layout)


def _descriptors(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, geo: _Geometry) -> dict[str, Any]:
    """Operands of the backward kernels with a written-out pipeline, all of them as descriptors."""
    return {
        "q": _gluon_descriptor(q, geo.pack, geo.rows, geo.block_d),
        "k": _gluon_descriptor(k, 1, geo.tile.cols, geo.block_d),
        "v": _gluon_descriptor(v, 1, geo.tile.cols, geo.block_d),
        "dout": _gluon_descriptor(dout, geo.pack, geo.rows, geo.block_d),
    }


def _head_strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(2), x.stride(1)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 and all(x.stride()) else x.contiguous()


def _common(launch: Launch, lines: Lines) -> dict[str, Any]:
    def per_batch(x: Tensor | None) -> int:
        return x.shape[-1] if x is not None and x.shape[0] > 1 else 0

    return {
        "items": lines.items,
        "entries": lines.items if lines.entries is None else lines.entries,
        "q_pos": launch.q_pos,
        "k_pos": launch.k_pos,
        "q_doc": launch.q_pos if launch.q_doc is None else launch.q_doc,
        "k_doc": launch.k_pos if launch.k_doc is None else launch.k_doc,
        "qpos_b": per_batch(launch.q_pos),
        "kpos_b": per_batch(launch.k_pos),
        "qdoc_b": per_batch(launch.q_doc),
        "kdoc_b": per_batch(launch.k_doc),
        "window": 0 if launch.window is None else launch.window,
        "PER_QUERY_HEAD": launch.per_query_head,
        "CLOSED": lines.entries is None,
        "HAS_DOC": launch.q_doc is not None,
        "HAS_WINDOW": launch.window is not None,
    }


def _pattern(lines: Lines) -> dict[str, Any]:
    pattern = lines.items if lines.pattern is None else lines.pattern
    return {"pattern": pattern, "pattern_h": 4 if lines.pattern is not None and len(pattern) > 1 else 0}


def _bounds(lines: Lines) -> dict[str, Any]:
    if lines.bounds is None:
        return {"bounds": lines.items, "bounds_b": 0, "bounds_h": 0}
    batch, heads, num_lines, _ = lines.bounds.shape
    return {
        "bounds": lines.bounds,
        "bounds_b": num_lines * heads * 4 if batch > 1 else 0,
        "bounds_h": num_lines * 4 if heads > 1 else 0,
    }


def _tile_args(q: Tensor, k: Tensor, geo: _Geometry, scale: float) -> dict[str, Any]:
    options: dict[str, Any] = {"num_warps": geo.tile.num_warps}
    if geo.tile.maxnreg is not None:
        options["maxnreg"] = geo.tile.maxnreg
    return {
        "num_q": q.shape[1],
        "num_k": k.shape[1],
        "num_heads": q.shape[2],
        "scale_log2": scale * LOG2E,
        "GROUP": q.shape[2] // k.shape[2],
        "PACK": geo.pack,
        "ROWS": geo.rows,
        "SPLIT_Q": geo.split_q,
        "SPLIT_K": geo.split_k,
        "D": q.shape[3],
        "BLOCK_D": geo.block_d,
        **options,
    }


def _pipeliner_args(q: Tensor, v: Tensor, geo: _Geometry, tma: bool) -> dict[str, Any]:
    """What only the kernels take whose pipeline the compiler makes."""
    return {
        "COLS": geo.tile.cols,
        "DV": v.shape[3],
        "BLOCK_DV": geo.block_v,
        "TMA": tma,
        "UPCAST": INTERPRETED and q.dtype == torch.bfloat16,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "num_stages": geo.tile.num_stages,
    }


def _strides(**tensors: Tensor) -> dict[str, int]:
    out = {}
    for name, x in tensors.items():
        out[f"{name}_b"], out[f"{name}_h"], out[f"{name}_t"] = _head_strides(x)
    return out


def _launch(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Launch:
    """Checks what only these kernels ask, and the launch."""
    require(
        q.is_cuda or INTERPRETED, "backend", "triton", f"needs GPU tensors, q is on {q.device}; use 'cpu'"
    )
    require(q.dtype != torch.float64, "q.dtype", q.dtype, "must be float32, bfloat16 or float16 for 'triton'")
    require(scale > 0, "scale", scale, "must be positive for backend 'triton'")
    for name in ("block_q", "block_k"):
        block = getattr(plan.index, name)
        require(block % 16 == 0, f"index.{name}", block, "must be a multiple of 16 for backend 'triton'")
    head_bytes = (k.shape[3] + v.shape[3]) * k.element_size()
    return launch_of(plan, q.shape[0], q.shape[2], k.shape[2], head_bytes)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Plan,
    scale: float,
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B,T,H,D] over k [B,T,K,D], v [B,T,K,V] -> out [B,T,H,V], lse fp32 [B,H,T] (natural
    log)."""
    launch = _launch(q, k, v, plan, scale)
    q, k, v = (_last_contiguous(x) for x in (q, k, v))
    batch, num_q, heads, _ = q.shape
    out = torch.empty(batch, num_q, heads, v.shape[3], dtype=out_dtype, device=q.device)
    lse = torch.empty(batch, heads, num_q, dtype=torch.float32, device=q.device)
    if not q.numel() or not k.numel():
        return out.zero_(), lse.fill_(float("-inf"))
    group = heads // k.shape[2]
    arch = _capability(q)
    geo = geometry("forward", arch, q.element_size() * 8, group, q.shape[3], v.shape[3], launch, tile)
    lines = launch.rows
    programs = len(lines.items) * geo.split_q * (1 if launch.per_query_head else group // geo.pack)
    shared = {
        "out": out, "lse": lse, **_strides(o=out), **_common(launch, lines), **_pattern(lines),
        **_tile_args(q, k, geo, scale),
    }  # fmt: skip
    if geo.explicit and _use_descriptors(arch, q, k, v):
        attention_forward_hopper[(programs,)](
            q=_gluon_descriptor(q, geo.pack, geo.rows, geo.block_d),
            k=_gluon_descriptor(k, 1, geo.tile.cols, geo.block_d),
            v=_gluon_descriptor(v, 1, geo.tile.cols, geo.block_d),
            **shared,
        )  # fmt: skip
        return out, lse
    tma = _use_descriptors(arch, k, v)
    attention_forward[(programs,)](
        q=q,
        k=_descriptor(k, 1, geo.tile.cols, geo.block_d) if tma else k,
        v=_descriptor(v, 1, geo.tile.cols, geo.block_v) if tma else v,
        ONE_LOOP=geo.tile.one_loop,
        **_strides(q=q, k=k, v=v), **shared, **_pipeliner_args(q, v, geo, tma),
    )  # fmt: skip
    return out, lse


def delta(out: Tensor, dout: Tensor, dlse: Tensor | None = None) -> Tensor:
    """Sum over V of out * dout, less dlse: fp32 [B, H, T], in one pass."""
    out, dout = _last_contiguous(out), _last_contiguous(dout)
    batch, num_q, heads, value_dim = out.shape
    result = torch.empty(batch, heads, num_q, dtype=torch.float32, device=out.device)
    if out.numel():
        block_v = max(16, triton.next_power_of_2(value_dim))
        rows = max(16, 8192 // block_v)
        attention_delta[(triton.cdiv(num_q, rows), heads, batch)](
            out, dout, result if dlse is None else dlse.contiguous(), result,
            *_head_strides(out), *_head_strides(dout), num_q, heads,
            ROWS=rows, DV=value_dim, BLOCK_DV=block_v, HAS_DLSE=dlse is not None,
        )  # fmt: skip
    return result


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, plan: Plan, scale: float,
    into: tuple[Tensor, Tensor, Tensor], *, accumulate: bool, tiles: tuple[Tile | None,
    Tile | None] = (None, None),
    parts: tuple[str, ...] = ("dq", "dkdv"),
) -> None:  # fmt: skip
    """Write dq, dk, dv into the tensors `into` (any strides but a contiguous last axis); `accumulate` adds to
    them.

    `tiles` overrides the table and `parts` leaves a kernel out: for tuning.
    """
    launch = _launch(q, k, v, plan, scale)
    dout, q, k, v = (_last_contiguous(x) for x in (dout.to(q.dtype), q, k, v))
    dq, dk, dv = into
    for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
        require(x.stride(-1) == 1, f"grads {name}.stride(-1)", x.stride(-1), "must be 1 for backend 'triton'")
    if not q.numel() or not k.numel():
        if not accumulate:
            for x in into:
                x.zero_()
        return
    heads, kv_heads = q.shape[2], k.shape[2]
    group = heads // kv_heads
    arch = _capability(q)
    tma = _use_descriptors(arch, q, k, v, dout)
    sizes = (arch, q.element_size() * 8, group, q.shape[3], v.shape[3], launch)
    shared = {"delta": delta.contiguous(), "scale": scale, "ACCUMULATE": accumulate}
    geos = {name: geometry(name, *sizes, tile) for name, tile in zip(("dq", "dkdv"), tiles, strict=True)}
    explicit = {name: geo.explicit and tma for name, geo in geos.items()}
    lse = lse.contiguous()
    if not all(explicit[part] for part in parts):
        # Base 2, and +inf for rows without keys: then exp2(s - lse2) is 0 there, with no test in the kernels.
        lse2 = torch.where(lse == float("-inf"), float("inf"), lse * LOG2E)

    if "dq" in parts:
        lines, geo = launch.rows, geos["dq"]
        programs = len(lines.items) * geo.split_q * (1 if launch.per_query_head else group // geo.pack)
        named = {
            **shared, "dq": dq, **_strides(dq=dq), **_common(launch, lines), **_pattern(lines),
            **_tile_args(q, k, geo, scale),
        }  # fmt: skip
        if explicit["dq"]:
            attention_dq_hopper[(programs,)](lse=lse, **_descriptors(q, k, v, dout, geo), **named)
        else:
            attention_dq[(programs,)](
                q=q, dout=dout, lse2=lse2,
                k=_descriptor(k, 1, geo.tile.cols, geo.block_d) if tma else k,
                v=_descriptor(v, 1, geo.tile.cols, geo.block_v) if tma else v,
                **_strides(q=q, k=k, v=v, do=dout), **named, **_pipeliner_args(q, v, geo, tma),
            )  # fmt: skip
    if "dkdv" in parts:
        lines, geo = launch.columns, geos["dkdv"]
        programs = len(lines.items) * geo.split_k
        named = {
            **shared, "dk": dk, "dv": dv, **_strides(dk=dk, dv=dv), **_bounds(lines),
            **_common(launch, lines), **_tile_args(q, k, geo, scale),
        }  # fmt: skip
        if explicit["dkdv"]:
            attention_dkdv_hopper[(programs,)](lse=lse, **_descriptors(q, k, v, dout, geo), **named)
        else:
            attention_dkdv[(programs,)](
                k=k, v=v, lse2=lse2,
                q=_descriptor(q, geo.pack, geo.rows, geo.block_d) if tma else q,
                dout=_descriptor(dout, geo.pack, geo.rows, geo.block_v) if tma else dout,
                **_strides(q=q, k=k, v=v, do=dout), **named, **_pipeliner_args(q, v, geo, tma),
            )  # fmt: skip
