"""Where weights come from: a folder of safetensors, or random numbers by name."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ltrain.config.base import ConfigError
from ltrain.model.families.base import read_json
from ltrain.model.sharding import HEAD, hf_shapes
from ltrain.model.spec import ModelSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F32", "BF16", "F16")


class WeightSource(Protocol):
    """Hands out slices of named tensors."""

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor: ...


class SafetensorsSource:
    """The tensors of a Hugging Face folder, read slice by slice; use it as a context manager.

    Raises ConfigError, naming file and tensor, where one is missing, extra, cut short or of the wrong shape.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._expected = hf_shapes(spec)
        self._where = self._locate()
        for name in self._expected:
            self._check(name)

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        stored = self._open(self._where[name]).get_slice(name)
        return stored[start:stop] if dim == 0 else stored[:, start:stop]

    def _locate(self) -> dict[str, str]:
        """Which file holds which tensor; refuses missing and extra tensors."""
        if (self.folder / INDEX).exists():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(file, str) and Path(file).name == file for file in weight_map.values()
            ):
                raise ConfigError(
                    "model.path", str(self.folder / INDEX), "must map tensors to files beside it"
                )
            files = sorted(set(weight_map.values()))
        elif (self.folder / SINGLE).exists():
            weight_map, files = {}, [SINGLE]
        else:
            fix = "save the model with save_pretrained(safe_serialization=True)"
            raise ConfigError("model.path", str(self.folder), f"must hold {SINGLE} or {INDEX}", fix)
        found: dict[str, str] = {}
        for file in files:
            for name in self._open(file).keys():  # noqa: SIM118 (safe_open is no mapping)
                found[name] = file
        for name in (*self._expected, *weight_map):
            if name not in found:
                file = weight_map.get(name, files[0] if len(files) == 1 else INDEX)
                raise ConfigError("model.path", str(self.folder / file), f"lacks the tensor {name}")
        for name in sorted(set(found) - set(self._expected)):
            # Buffers that old exports kept, and the second name of a tied embedding, carry no information.
            if not name.endswith("rotary_emb.inv_freq") and name != HEAD:
                rule = f"holds the tensor {name}, which this architecture doesn't have"
                raise ConfigError("model.path", str(self.folder / found[name]), rule)
        return found

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            except FileNotFoundError:
                raise ConfigError("model.path", str(self.folder / file), "is missing") from None
            except (SafetensorError, OSError) as error:
                rule = f"is cut short or damaged ({error})"
                raise ConfigError("model.path", str(self.folder / file), rule, "copy it again") from None
        return self._files[file]

    def _check(self, name: str) -> None:
        file = self._where[name]
        stored = self._open(file).get_slice(name)
        shape, expected = tuple(stored.get_shape()), self._expected[name]
        if shape != expected:
            rule = f"holds {name} with shape {list(shape)}; config.json implies {list(expected)}"
            raise ConfigError("model.path", str(self.folder / file), rule)
        if stored.get_dtype() not in FLOATS:
            rule = f"holds {name} as {stored.get_dtype()}, not as {', '.join(FLOATS)}"
            raise ConfigError("model.path", str(self.folder / file), rule)


def check_weights(spec: ModelSpec) -> None:
    """Raise ConfigError, naming file and tensor, unless `spec.source` holds exactly this model's tensors.

    Reads the headers only.
    """
    assert spec.source is not None
    with SafetensorsSource(spec.source, spec):
        pass


class RandomSource:
    """Normal matrices, zero biases, unit norms. A tensor depends on the seed and its name only, so that every
    layout starts from the same model."""

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self._shapes, self._std, self._seed = hf_shapes(spec), spec.initializer_range, seed
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        if self._last[0] != name:
            self._last = (name, self._make(name))
        return self._last[1].narrow(dim, start, stop - start)

    def _make(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        return named_normal(name, shape, self._std, self._seed)


def named_normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> Tensor:
    """fp32 normal values that depend on the seed and the name only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
