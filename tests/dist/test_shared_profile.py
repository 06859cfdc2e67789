"""A profile of another machine is refused on all ranks alike; gathered blocks have the gradients of the
whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.distributed import run_ranks

from ltrain.attention.gather_blocks import gather_blocks
from ltrain.attention.profile import PROFILES, device_name, shared_profile
from ltrain.config.base import ConfigError
from ltrain.parallel.layout import SequenceLayout


def _profiles(rank, folder):
    cpu = torch.device("cpu")
    own = replace(PROFILES["cpu-gloo"], device=device_name(cpu))
    own.save(folder / "own.json")
    dist.barrier()
    assert shared_profile(folder / "own.json", dist.group.WORLD, cpu) == own
    # Rank 1 is on another machine, and has another file of that name.
    texts = []
    for name, changed in (("device", {"device": "H100"}), ("name", {"name": "another"})):
        path = folder / f"{rank}-{name}.json"
        (replace(own, **changed) if rank == 1 else own).save(path)
        with pytest.raises(ConfigError) as refused:
            shared_profile(path, dist.group.WORLD, cpu)
        texts.append(f"{refused.value.field} {refused.value.rule}")
    return texts


def _gathered(rank, world_size):
    """Largest difference of values and gradients from one process's."""
    torch.manual_seed(0)
    worst = 0.0
    for kind, blocks in (("striped", 7), ("contiguous", 2)):
        layout = SequenceLayout(kind, blocks * 4, world_size, 4)
        x, y, weight = (torch.randn(1, blocks, 3, 2, dtype=torch.float64) for _ in range(3))
        mine = torch.from_numpy(layout.blocks(rank))
        own = [t[:, mine].requires_grad_() for t in (x, y)]
        got = gather_blocks(*own, layout=layout, group=dist.group.WORLD)
        ((got[0] * weight).sum() + (got[1] ** 2).sum()).backward()
        for value, whole in zip(got, (x, y), strict=True):
            worst = max(worst, float((value - whole).abs().max()))
        for t, gradient in zip(own, (weight, 2 * y), strict=True):
            if len(mine):
                worst = max(worst, float((t.grad - world_size * gradient[:, mine]).abs().max()))
    return worst


def _on_ranks(rank, world_size, folder):
    return _profiles(rank, Path(folder)), _gathered(rank, world_size)


def test_ranks_refuse_together_and_gather_exactly(tmp_path):
    results = run_ranks(_on_ranks, 3, str(tmp_path))
    assert all(worst < 1e-12 for _, worst in results)
    texts = [texts for texts, _ in results]
    assert texts[0] == texts[1] == texts[2]
    assert "profile.device: must be this machine's" in texts[0][0] and "found on rank 1" in texts[0][0]
    assert texts[0][1] == "parallel.context.profile must be equal on all ranks of the group"
