"""Writing a Hugging Face folder: safetensors files, config.json, tokenizer and generation config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

from ltrain.config.base import ConfigError
from ltrain.config.model import LoraAdapter
from ltrain.model import attention_file
from ltrain.model.families import FAMILIES
from ltrain.model.families.base import read_json
from ltrain.model.sharding import hf_shapes
from ltrain.model.sources import INDEX, SINGLE
from ltrain.model.spec import ModelSpec
from ltrain.model.tensors_out import TensorFiles

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json"),
)
ADAPTER = "adapter_model.safetensors"
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


class _Folder:
    """A folder that is made beside `folder` and takes its name in `publish`, once it is whole."""

    marker = "config.json"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        occupied = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if occupied and not (folder / self.marker).exists():
            rule = "exists and is not a model folder, so it is not overwritten"
            raise ConfigError("export folder", str(folder), rule, "choose another place")
        self.partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def publish(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.partial.rename(self.folder)

    def abandon(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.partial, ignore_errors=True)


class FolderWriter(_Folder):
    """A model folder: hand the shards to `files`, then call `finish`."""

    def __init__(self, folder: Path, spec: ModelSpec, dtype: torch.dtype, max_file_bytes: int) -> None:
        if spec.source is not None and folder.resolve() == spec.source.resolve():
            raise ConfigError("export folder", str(folder), "is the folder that the model was read from")
        super().__init__(folder)
        self.spec, self.dtype = spec, dtype
        shapes = hf_shapes(spec)
        file_of = plan_files(shapes, dtype.itemsize, max_file_bytes)
        self.files = TensorFiles(self.partial, shapes, file_of, dtype)

    def finish(
        self, tokenizer: SavesTokenizer | None, attention: attention_file.TrainedAttention | None = None
    ) -> None:
        """Write the small files and give the folder its name."""
        self.files.check_complete()
        if len(set(self.files.file_of.values())) > 1:
            index = {"metadata": {"total_size": self.files.num_bytes}, "weight_map": self.files.file_of}
            _write_json(self.partial / INDEX, index)
        _write_json(self.partial / "config.json", config_json(self.spec, self.dtype))
        if attention is not None:
            _write_json(self.partial / attention_file.NAME, attention.file())
        self._copy_small_files()
        if tokenizer is not None:
            tokenizer.save(self.partial)
        self.publish()

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


class AdapterWriter(_Folder):
    """A `peft` adapter folder: hand the shards to `files`, then call `finish`."""

    marker = "adapter_config.json"

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        lora: LoraAdapter,
        shapes: dict[str, tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(folder)
        self.spec, self.lora, self.dtype = spec, lora, dtype
        self.files = TensorFiles(self.partial, shapes, dict.fromkeys(shapes, ADAPTER), dtype)
        self._modules = sorted({name.rsplit(".lora_", 1)[0].rsplit(".", 1)[1] for name in shapes})

    def finish(self) -> None:
        """Write the small files and give the folder its name."""
        self.files.check_complete()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self.spec.source) if self.spec.source else None,
            "r": self.lora.rank,
            "lora_alpha": self.lora.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": self._modules,
            "inference_mode": True,
        }
        _write_json(self.partial / self.marker, config)
        _write_json(self.partial / "config.json", config_json(self.spec, self.dtype))
        self.publish()


def plan_files(shapes: dict[str, tuple[int, ...]], itemsize: int, max_file_bytes: int) -> dict[str, str]:
    """The file of each tensor, in order; a tensor larger than the limit has a file of its own."""
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
    return {name: file for file, names in zip(files, groups, strict=True) for name in names}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=False) + "\n")
