"""`ltrain env`: versions, devices, links, and which kernels are usable here and why the others are not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator

import torch

from ltrain.metrics import devices

PACKAGES = (
    "torch",
    "megatron-core",
    "triton",
    "deepspeed",
    "transformers",
    "safetensors",
    "pydantic",
    "pyarrow",
    "pulp",
    "highspy",
    "lm_eval",
    "tensorboard",
    "wandb",
    "nvidia-ml-py",
)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def kernels() -> Iterator[tuple[str, str]]:
    """(kernel path, usable or why not)."""
    yield "block_sparse reference", "usable (any device, for tests)"
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        yield "block_sparse cpu", "PyTorch operations only: no C++ compiler for the extension"
    elif shutil.which("ninja") is None and version("ninja") == "not installed":
        yield "block_sparse cpu", "PyTorch operations only: ninja is missing"
    else:
        yield "block_sparse cpu", f"usable (C++ extension, built on first use with {compiler})"
    if version("triton") == "not installed":
        yield "block_sparse triton", "not usable: triton is not installed"
    elif not torch.cuda.is_available():
        yield "block_sparse triton", "not usable: no CUDA device"
    else:
        major, minor = torch.cuda.get_device_capability()
        usable = "usable" if major >= 8 else "not usable: needs compute capability 8.0"
        yield "block_sparse triton", f"{usable} (sm_{major}{minor})"


def environment_lines() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in PACKAGES:
        yield package, version(package)
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"
    yield "threads", str(torch.get_num_threads())
    yield "CPU", torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        yield "CUDA", str(torch.version.cuda)
        yield "driver", str(devices.driver_version())
        yield "NCCL", ".".join(map(str, torch.cuda.nccl.version()))
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            peak = devices.peak_tflops(facts.name)
            known = f"{peak:g} TFLOP/s dense bf16" if peak else "peak not known: no MFU"
            yield f"GPU {i}", f"{facts.name}, {facts.total_memory / devices.GIB:.0f} GiB, {known}"
        for i in range(torch.cuda.device_count()):
            peers = [
                j
                for j in range(torch.cuda.device_count())
                if j != i and torch.cuda.can_device_access_peer(i, j)
            ]
            yield f"GPU {i} peers", ", ".join(map(str, peers)) or "none"
    else:
        yield "GPU", "none: gloo on the CPU"
    yield from kernels()


def print_environment() -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 3))
    for name, value in environment_lines():
        table.add_row(f"[bold]{name}[/bold]", value)
    Console().print(table)
    return 0
