"""Models from Hugging Face folders, without any network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ltrain.config.base import ConfigError
from ltrain.data.tokenizer import Tokenizer, load_tokenizer
from ltrain.generation.model import SparseModel
from ltrain.model.attention_file import TrainedAttention
from ltrain.model.families import read_spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_folder(folder: Path) -> None:
    """Raise ConfigError unless it is a model folder."""
    if not (folder / "config.json").is_file():
        missing = "it has no config.json" if folder.is_dir() else "there is no such folder"
        rule = f"is not a model folder: {missing}"
        raise ConfigError("MODEL", str(folder), rule, "name a folder that `ltrain export` or training wrote")


def load_transformers(folder: Path, *, device: str = "auto", dtype: str = "auto") -> Any:
    """The model of a folder as `transformers` loads it.

    `device` `auto` is the first GPU where there is one; `dtype` `auto` is the folder's own. Raises
    ConfigError where the folder holds no such model.
    """
    check_folder(folder)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device", device, "is not there: no usable GPU", "use --device cpu")
    except RuntimeError:
        raise ConfigError("--device", device, "is no device", "use auto, cpu or cuda") from None
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=DTYPES.get(dtype, "auto"), local_files_only=True
        )
    except Exception as error:  # damaged weights and unknown architectures raise all kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError("MODEL", str(folder), f"cannot be loaded: {reason}", "export it again") from None
    return model.to(place)


def load_sparse(
    folder: Path, attention: TrainedAttention, *, device: str = "auto", dtype: str = "auto"
) -> tuple[SparseModel, Tokenizer]:
    """The model of a folder under a pattern, and its tokenizer. Raises ConfigError."""
    check_folder(folder)
    spec = read_spec(folder)
    model = load_transformers(folder, device=device, dtype=dtype)
    return SparseModel(model, spec, attention), load_tokenizer(str(folder))
