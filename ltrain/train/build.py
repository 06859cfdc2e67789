"""Building a run: what can be checked without a process group first, then mesh, model, data, optimizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ltrain.attention.module import AttentionSettings, CoreAttention
from ltrain.config.base import ConfigError
from ltrain.config.model import HFModel
from ltrain.config.schema import RunConfig
from ltrain.data.loader import Corpus, Loader, held_out_rows, open_corpus
from ltrain.data.tokenizer import Tokenizer, load_tokenizer
from ltrain.model.build import build_model
from ltrain.model.spec import ModelSpec
from ltrain.parallel.mesh import Mesh, check_world, init_mesh
from ltrain.train.assignment import StaticAssignment, rows_per_step
from ltrain.train.checkpoint.manager import CheckpointManager
from ltrain.train.evaluate import position_buckets
from ltrain.train.optimizer import build_optimizer
from ltrain.train.run import Run
from ltrain.train.step import wrap_ddp

log = logging.getLogger("ltrain")


def run_folder(config: RunConfig) -> Path:
    return config.run.output / config.run.name
