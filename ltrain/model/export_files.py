"""Writing a Hugging Face folder: safetensors files, config.json, tokenizer and generation config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from ltrain.config.base import ConfigError
from ltrain.model.families import FAMILIES
from ltrain.model.families.base import read_json
from ltrain.model.sharding import Shard
from ltrain.model.sources import INDEX, SINGLE
from ltrain.model.spec import ModelSpec

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
OLD_ROPE_FIELDS = ("rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


class SavesTokenizer(Protocol):
    """A tokenizer that can write itself as Hugging Face files."""

    def save(self, folder: Path) -> None: ...


def config_json(spec: ModelSpec, dtype: torch.dtype) -> dict[str, Any]:
    """config.json: the source's own, or a new one, with this rope, context and type."""
    family = FAMILIES[spec.family]
    config = read_json(spec.source / "config.json") if spec.source else family.write(spec)
    for name in (*OLD_ROPE_FIELDS, "torch_dtype"):
        config.pop(name, None)
    return {**config, **spec.rope.to_hf(), "dtype": str(dtype).removeprefix("torch.")}


class FolderWriter:
    """Collects shards into tensors and writes each file when all its tensors are there.

    Everything goes to a folder beside `folder`, which takes its name in `finish`.
    """

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
        max_file_bytes: int,
    ) -> None:
        self.folder, self.spec, self.dtype = folder, spec, dtype
        if folder.exists() and (
            not folder.is_dir() or (any(folder.iterdir()) and not (folder / "config.json").exists())
        ):
            rule = "exists and is not a model folder, so it is not overwritten"
            raise ConfigError("export folder", str(folder), rule, "choose another place")
        if spec.source is not None and folder.resolve() == spec.source.resolve():
            raise ConfigError("export folder", str(folder), "is the folder that the model was read from")
        self.partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        self._shapes = shapes
        self._file_of, self._left = plan_files(shapes, dtype.itemsize, max_file_bytes)
        self._tensors: dict[str, Tensor] = {}
        self._missing = {name: torch.Size(shape).numel() for name, shape in shapes.items()}

    def add(self, shard: Shard, value: Tensor) -> None:
        """Take one parameter's shard; a slice that came before, from another copy, is not counted again."""
        for piece in shard.pieces:
            if self._missing[piece.name] == 0:
                continue
            if piece.name not in self._tensors:
                self._tensors[piece.name] = torch.empty(self._shapes[piece.name], dtype=self.dtype)
            length = piece.stop - piece.start
            part = value.narrow(piece.dim, piece.offset, length)
            self._tensors[piece.name].narrow(piece.dim, piece.start, length).copy_(part)
            self._missing[piece.name] -= part.numel()
            if self._missing[piece.name] == 0:
                self._complete(piece.name)

    def _complete(self, name: str) -> None:
        file = self._file_of[name]
        self._left[file].discard(name)
        if not self._left[file]:
            tensors = {n: self._tensors.pop(n) for n, f in self._file_of.items() if f == file}
            try:
                save_file(tensors, self.partial / file, metadata={"format": "pt"})
            except Exception as error:  # safetensors wraps the system's error
                raise OSError(f"{self.partial / file} could not be written: {error}") from None

    def finish(self, tokenizer: SavesTokenizer | None) -> None:
        """Write the small files and give the folder its name."""
        assert not self._tensors and not any(self._missing.values())
        if len(self._left) > 1:
            total = sum(torch.Size(shape).numel() for shape in self._shapes.values()) * self.dtype.itemsize
            index = {"metadata": {"total_size": total}, "weight_map": self._file_of}
            _write_json(self.partial / INDEX, index)
        _write_json(self.partial / "config.json", config_json(self.spec, self.dtype))
        self._copy_small_files()
        if tokenizer is not None:
            tokenizer.save(self.partial)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.partial.rename(self.folder)

    def _copy_small_files(self) -> None:
        source = self.spec.source
        if source is None:
            return
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (source / name).exists():
                shutil.copyfile(source / name, self.partial / name)
        path = self.partial / "tokenizer_config.json"
        if path.exists():
            config = read_json(path)
            longest = self.spec.rope.max_position_embeddings
            if isinstance(config.get("model_max_length"), int) and config["model_max_length"] < longest:
                _write_json(path, {**config, "model_max_length": longest})

    def abandon(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)


def plan_files(
    shapes: dict[str, tuple[int, ...]], itemsize: int, max_file_bytes: int
) -> tuple[dict[str, str], dict[str, set[str]]]:
    """The file of each tensor, and the tensors of each file; a tensor larger than the limit has its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        num_bytes = torch.Size(shape).numel() * itemsize
        if groups[-1] and size + num_bytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += num_bytes
    count = len(groups)
    files = (
        [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    file_of = {name: file for file, names in zip(files, groups, strict=True) for name in names}
    return file_of, {file: set(names) for file, names in zip(files, groups, strict=True)}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=False) + "\n")
