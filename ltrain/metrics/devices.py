"""Memory and device facts: CUDA's allocator and NVML where there is a GPU, the process's own memory
elsewhere.
"""

from __future__ import annotations

import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30

# Dense bf16 peaks in TFLOP/s from NVIDIA's data sheets, without sparsity.
PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "H800": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "A40": 149.7,
    "RTX 4090": 165.2,
}


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by its name, or None where it is not known: never a guess."""
    matches = [name for name in PEAK_TFLOPS if name in device_name]
    return PEAK_TFLOPS[max(matches, key=len)] if matches else None


def host_memory_gib() -> float:
    """Resident memory of this process now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / GIB
    except OSError:
        return peak_host_memory_gib()


def peak_host_memory_gib() -> float:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def memory_metrics() -> dict[str, float]:
    """The `mem/` metrics of this process."""
    metrics = {"mem/host_gib": host_memory_gib()}
    if torch.cuda.is_available():
        stats = torch.cuda.memory_stats()
        metrics["mem/max_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        metrics["mem/max_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
        metrics["mem/alloc_retries"] = float(stats.get("num_alloc_retries", 0))
    else:
        metrics["mem/max_allocated_gib"] = peak_host_memory_gib()
    return metrics


@cache
def _nvml() -> Any | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml
    except Exception:  # no driver, no library, or no permission: there are no GPU facts then
        return None


def gpu_metrics(index: int) -> dict[str, float]:
    """The `gpu/` metrics of one device through NVML; empty where there is none."""
    nvml = _nvml()
    if nvml is None:
        return {}
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    return {
        "gpu/utilization": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        "gpu/power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "gpu/temperature_c": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
    }


def driver_version() -> str | None:
    nvml = _nvml()
    return None if nvml is None else str(nvml.nvmlSystemGetDriverVersion())
