"""Random scores from a counter: a function of their key alone, equal on all ranks and after a resume."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def random_scores(num_blocks: int, *key: int) -> Tensor:
    """Uniform fp32 [N] in [0, 1), from Philox keyed by up to four integers; no generator state is touched."""
    if len(key) > 4:
        raise ValueError(f"{len(key)} numbers do not fit the key")
    words = np.zeros(4, np.uint64)
    words[: len(key)] = [np.uint64(value & 0xFFFFFFFFFFFFFFFF) for value in key]
    # Two words are the key of the cipher, two its counter's high half; the low half counts draws.
    counter = np.array([0, 0, words[2], words[3]], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=words[:2], counter=counter))
    return torch.from_numpy(generator.random(num_blocks, dtype=np.float32))
