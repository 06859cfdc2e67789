"""What a machine's links and kernels do, as far as a choice of schedule needs it.

Built-in profiles hold published or nominal figures and say so in `source`; `ltrain calibrate` measures the
rest.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from ltrain.config.base import ConfigError
from ltrain.parallel.agreement import agree
from ltrain.parallel.collectives import Group


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes latency_s + n / (gb_s x 1e9) seconds; one direction, per rank."""

    gb_s: float
    latency_s: float

    def time(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / (self.gb_s * 1e9)


@dataclass(frozen=True)
class Profile:
    """kernel_tflops: achieved by the attention kernel on long chunks; with chunks of n key tokens it achieves
    n / (n + half_tokens) of that. backward_factor: backward over forward time of the kernel.

    step_s: host time and launches of one attention call. memory_gb_s: device memory, for merging partial
    results. device: what `device_name` says of the machine it holds for.
    """

    name: str
    device: str
    node_size: int
    in_node: Link
    between_nodes: Link
    kernel_tflops: float
    half_tokens: float
    backward_factor: float
    step_s: float
    memory_gb_s: float
    source: str

    def kernel_s(self, flops: float, key_tokens: float) -> float:
        """Seconds of one call over `key_tokens` keys."""
        if flops <= 0:
            return 0.0
        efficiency = key_tokens / (key_tokens + self.half_tokens) if key_tokens else 1.0
        return flops / (self.kernel_tflops * 1e12 * efficiency)

    def link(self, a: int, b: int) -> Link:
        return self.in_node if a // self.node_size == b // self.node_size else self.between_nodes

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Raises ConfigError on a file that isn't a profile."""
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError("profile", str(path), f"can't be read: {error}") from None
        known = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or set(data) != known:
            raise ConfigError(
                "profile", str(path), f"must have exactly the fields {sorted(known)}", "run ltrain calibrate"
            )
        links = {name: Link(**data.pop(name)) for name in ("in_node", "between_nodes")}
        return cls(**data, **links)

    def check_machine(self, device: torch.device) -> None:
        """Raises ConfigError where the profile was measured on another kind of machine."""
        here = device_name(device)
        if self.device not in (here, "any"):
            raise ConfigError(
                "profile.device", self.device, f"must be this machine's {here!r}", "run ltrain calibrate here"
            )


def shared_profile(path: Path, group: Group, device: torch.device) -> Profile:
    """The profile of a file, checked against every rank's machine.

    Collective; raises ConfigError on all ranks where one can't read it, has another one, or is another
    machine.
    """
    profile, error = None, None
    try:
        profile = Profile.load(path)
        profile.check_machine(device)
    except ConfigError as caught:
        error = ConfigError(
            "parallel.context.profile", str(path), f"{caught.field}: {caught.rule}", caught.fix
        )
    agree(group, {"parallel.context.profile": profile}, error)
    assert profile is not None
    return profile


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} cpu"


_NODE = 8
PROFILES = {
    p.name: p
    for p in (
        # Effective rates that arXiv 2510.18830's per-layer times imply: 16.8 MB of KV a hop in 0.98 and 0.13
        # ms; 16.3 ms of forward compute at 95 % sparsity, merges included; 2.08 ms of host time for 32 steps.
        Profile(
            "a100-40gb-hdr",
            "any",
            _NODE,
            Link(129.0, 5e-6),
            Link(17.1, 10e-6),
            108.0,
            0.0,
            2.5,
            65e-6,
            1e9,
            "arXiv 2510.18830, per-layer times",
        ),
        Profile(
            "h100-ndr",
            "any",
            _NODE,
            Link(350.0, 5e-6),
            Link(45.0, 10e-6),
            450.0,
            500.0,
            2.5,
            30e-6,
            3000.0,
            "nominal",
        ),
        Profile(
            "h200",
            "any",
            _NODE,
            Link(350.0, 5e-6),
            Link(45.0, 10e-6),
            450.0,
            500.0,
            2.5,
            30e-6,
            4300.0,
            "nominal",
        ),
        Profile(
            "ethernet-100g",
            "any",
            _NODE,
            Link(350.0, 5e-6),
            Link(1.4, 30e-6),
            450.0,
            500.0,
            2.5,
            30e-6,
            3000.0,
            "nominal: H100 nodes that share one 100 Gbit port among 8 ranks",
        ),
        Profile(
            "cpu-gloo",
            "any",
            1 << 20,
            Link(1.0, 2e-4),
            Link(0.1, 2e-4),
            0.05,
            64.0,
            2.5,
            3e-4,
            8.0,
            "order of magnitude of one core and a loopback",
        ),
    )
}


def default_profile(device: torch.device, node_size: int | None) -> Profile:
    """A built-in profile for a device nobody has calibrated."""
    if device.type != "cuda":
        profile = PROFILES["cpu-gloo"]
    else:
        name = torch.cuda.get_device_name(device)
        profile = PROFILES["a100-40gb-hdr" if "A100" in name else "h200" if "H200" in name else "h100-ndr"]
    return profile if node_size is None else replace(profile, node_size=node_size)
