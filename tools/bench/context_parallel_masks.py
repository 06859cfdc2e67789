"""The masks of the context-parallel benchmarks, as block indices of whole sequences."""

from __future__ import annotations

import numpy as np
import torch

from ltrain_kernels.block_sparse import BlockIndex, closed

PATTERNS = ("dense", "window", "strided", "slashes", "random")


def make_index(
    pattern: str, num_tokens: int, block: int, kv_heads: int, density: float, seed: int = 0
) -> BlockIndex:
    """The index of a pattern over the whole sequence; `density` is the share of causal blocks for the last
    two."""
    blocks = -(-num_tokens // block)
    if pattern == "dense":
        return closed.dense(num_tokens, block)
    if pattern == "window":
        return closed.sliding_window(num_tokens, block, local=min(33, max(2, blocks // 16)))
    if pattern == "strided":
        stride = max(2, kv_heads)
        residues = [-h % stride for h in range(kv_heads)]
        return closed.strided(num_tokens, block, local=16, stride=stride, residues=residues)
    if pattern == "slashes":
        offsets = slash_offsets(blocks, kv_heads, density, seed)
        width = max(len(o) for o in offsets)
        ids = torch.full((1, kv_heads, blocks, width), -1)
        rows = torch.arange(blocks)[:, None]
        for head, own in enumerate(offsets):
            ids[0, head, :, : len(own)] = (rows - torch.from_numpy(own)[None]).clamp(min=-1)
        return BlockIndex.from_rows(ids, blocks, block, block)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(1, kv_heads, blocks, blocks, generator=generator) < density
    mask |= torch.eye(blocks, dtype=torch.bool)
    return BlockIndex.from_mask(mask, block, block, causal=True)


def slash_offsets(blocks: int, heads: int, density: float, seed: int) -> list[np.ndarray]:
    """Block diagonals of each head: the nearest quarter of the budget, the rest log-uniform, as found in
    practice."""
    rng = np.random.default_rng(seed)
    budget, found = density * blocks * (blocks + 1) / 2, []
    for _ in range(heads):
        near = max(1, int(budget / blocks / 4))
        far = np.unique(np.exp(rng.uniform(0, np.log(max(blocks, 2)), 4 * blocks)).astype(int))
        own, area = list(range(near)), sum(blocks - o for o in range(near))
        for offset in rng.permutation(far[(far >= near) & (far < blocks)]):
            if area >= budget:
                break
            own.append(int(offset))
            area += blocks - int(offset)
        found.append(np.array(sorted(own)))
    return found
