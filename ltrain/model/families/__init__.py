"""The model families, and the way from the `model` section to a `ModelSpec`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ltrain.config.base import ConfigError
from ltrain.config.model import HFModel, NewModel
from ltrain.config.rope import RopeConfig
from ltrain.model.families.base import Family, read_json
from ltrain.model.families.llama import Llama
from ltrain.model.families.mistral import Mistral
from ltrain.model.families.qwen2 import Qwen2
from ltrain.model.families.qwen3 import Qwen3
from ltrain.model.spec import ModelSpec

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Llama(), Qwen2(), Qwen3(), Mistral())}


def read_spec(folder: Path) -> ModelSpec:
    """The spec of a Hugging Face folder. Raises ConfigError that names the unsupported feature."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"{path}: model_type", model_type, f"must be one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type].read(config, Path(folder))


def resolve_spec(config: HFModel | NewModel, *, tokenizer_vocab_size: int | None = None) -> ModelSpec:
    """The spec that the `model` section asks for, with the model's own rope.

    `tokenizer_vocab_size` serves a new model without `vocab_size`, and no model may have fewer tokens than
    it.
    """
    if isinstance(config, HFModel):
        spec = read_spec(config.path)
    else:
        vocab_size = config.vocab_size or tokenizer_vocab_size
        if vocab_size is None:
            raise ConfigError("model.vocab_size", None, "must be given where no tokenizer is known")
        spec = FAMILIES[config.family].new(config, vocab_size)
    if tokenizer_vocab_size is not None and tokenizer_vocab_size > spec.vocab_size:
        rule = f"must be at least the tokenizer's {tokenizer_vocab_size}"
        raise ConfigError("model.vocab_size", spec.vocab_size, rule, "use the model's own tokenizer")
    return spec


def extend_rope(spec: ModelSpec, change: RopeConfig, seq_len: int) -> ModelSpec:
    """The spec with its rotary embedding changed for training at `seq_len` tokens."""
    return replace(spec, rope=spec.rope.extend(change, seq_len))
