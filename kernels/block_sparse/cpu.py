"""Block-sparse attention on the CPU: the C++ extension, or PyTorch operations where it can't be built.

The extension is built when it is first used, into PyTorch's extension cache, once for every PyTorch version
and processor type. Without a compiler the same results come from cpu_torch.py, slower, after one warning.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import platform
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ltrain_kernels.block_sparse import cpu_torch
from ltrain_kernels.block_sparse.plan import Plan

SOURCE = Path(__file__).with_name("cpu_kernels.cpp")
HEADERS = sorted(SOURCE.parent.glob("cpu_*.h"))


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """out [B, Tq, Hq, Dv] in `out_dtype`, lse [B, Hq, Tq] fp32 (fp64 for fp64 inputs)."""
    if not extension_loaded():
        return cpu_torch.forward(q, k, v, plan, scale, out_dtype)
    q, k, v = (x.to(_computed(q.dtype)) for x in (q, k, v))
    batch, tq, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(batch, tq, heads, v.shape[3], dtype=_result(out_dtype, q, wide))
    lse = torch.empty(batch, heads, tq, dtype=wide)
    torch.ops.ltrain_block_sparse.forward(
        _pack(q, k, plan), _rows(k), _rows(v), *_arguments(plan, cols=False), float(scale), out, lse
    )
    return out.to(out_dtype), lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
    *,
    accumulate: bool,
) -> None:
    """Write dq, dk, dv of this call to `grads` (add to them if `accumulate`), given the lse and delta of the
    whole rows [B, Hq, Tq].
    """
    if not extension_loaded():
        cpu_torch.backward(dout, q, k, v, delta, lse, plan, scale, grads, accumulate=accumulate)
        return
    dout, q, k, v = (x.to(_computed(q.dtype)) for x in (dout, q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    # One kernel call writes one type, contiguously; other buffers are filled from its results.
    dtype = _result(grads[0].dtype, q, wide)
    direct = all(x.dtype == dtype and x.is_contiguous() for x in grads)
    into = grads if direct else tuple(torch.empty(x.shape, dtype=wide) for x in (q, k, v))
    # Rows that see no key anywhere: exp(S - inf) is 0, as their weights must be.
    lse = torch.where(torch.isinf(lse), float("inf"), lse)
    torch.ops.ltrain_block_sparse.backward(
        _pack(dout, k, plan),
        _pack(q, k, plan),
        _rows(k),
        _rows(v),
        *(_pack(x.to(wide).transpose(1, 2).unsqueeze(-1), k, plan) for x in (delta, lse)),
        *_arguments(plan, cols=True),
        float(scale),
        accumulate and direct,
        *into,
    )
    if not direct:
        for grad, made in zip(grads, into, strict=True):
            if accumulate:
                grad += made
            else:
                grad.copy_(made)


def _computed(dtype: torch.dtype) -> torch.dtype:
    """The type of the matrix products: the inputs' own, or fp32 where the BLAS has none for it."""
    if dtype == torch.bfloat16 and torch.ops.ltrain_block_sparse.has_bf16():
        return dtype
    return torch.promote_types(dtype, torch.float32)


def _result(wanted: torch.dtype, q: Tensor, wide: torch.dtype) -> torch.dtype:
    return wanted if wanted in (q.dtype, wide) else wide


def _pack(x: Tensor, k: Tensor, plan: Plan) -> Tensor:
    """[B, T, Hq, D] as [B, P, T, G, D]: the G query heads of a plane share a list and a key/value head."""
    heads = x.shape[2]
    group = min(heads // plan.index.heads, heads // k.shape[2])
    return x.reshape(*x.shape[:2], heads // group, group, x.shape[3]).transpose(1, 2).contiguous()


def _rows(x: Tensor) -> Tensor:
    """Keys or values as they are, unless a head's numbers are not consecutive or rows overlap."""
    fits = x.stride(3) == 1 and x.stride(1) >= x.shape[3]
    return x if fits and x.numel() else x.contiguous()


def _arguments(plan: Plan, *, cols: bool) -> list[Tensor | int]:
    q_doc, k_doc = plan.q_doc, plan.k_doc
    if q_doc is None or k_doc is None:
        q_doc, k_doc = (x.new_zeros(1, x.shape[1]) for x in (plan.q_pos, plan.k_pos))
    lists = [plan.rows, plan.cols] if cols else [plan.rows]
    return [
        *(x for part in lists for x in (part.ptr.contiguous(), part.mid.contiguous(), part.ids)),
        plan.q_pos,
        plan.k_pos,
        q_doc,
        k_doc,
        plan.index.block_q,
        plan.index.block_k,
        plan.window or 0,
    ]


@functools.cache
def extension_loaded() -> bool:
    """Build (once, under the build directory's lock) and load the extension; if it can't be, warn: False."""
    from torch.utils import cpp_extension

    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    name = f"ltrain_block_sparse_{_build_key()}"
    try:
        folder = Path(cpp_extension._get_build_directory(name, verbose=False))
        with (folder / "ltrain.lock").open("w") as lock:
            # PyTorch's own lock is a file that a killed build leaves behind, and every later one waits for.
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
            cpp_extension.load(
                name=name,
                sources=[str(SOURCE)],
                extra_cflags=["-O3", native, "-fopenmp", "-fno-math-errno", "-fno-trapping-math", *_wide()],
                extra_ldflags=["-fopenmp"],
                build_directory=str(folder),
                is_python_module=False,
            )
    except Exception as error:
        warnings.warn(
            "the C++ attention kernel could not be built, PyTorch operations are used instead (several times "
            f"slower): {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


def _wide() -> list[str]:
    return ["-mprefer-vector-width=512"] if torch.backends.cpu.get_cpu_capability() == "AVX512" else []


def _build_key() -> str:
    """Differs where a build made elsewhere must not be loaded: PyTorch, source text, processor type."""
    info = Path("/proc/cpuinfo")
    flags = re.search(r"^(flags|Features)\s*:.*$", info.read_text(), re.MULTILINE) if info.exists() else None
    processor = flags.group(0) if flags else platform.processor()
    sources = (path.read_text() for path in (SOURCE, *HEADERS))
    text = "\n".join([torch.__version__, platform.machine(), processor, *sources])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
