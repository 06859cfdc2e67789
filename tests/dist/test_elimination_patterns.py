"""A sparse layer under a pattern that is found online: the same on two context-parallel ranks as on one."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from support.distributed import run_ranks
from support.elimination import DOCUMENTS, FOUND, make_context, make_elimination, make_model
from support.models import save_tiny

from ltrain.parallel.layout import SequenceLayout

MODES = ("qkv", "q", "layer", "backward")
SCORES = torch.rand(12, generator=torch.Generator().manual_seed(2))


def _layers(rank, world_size, folder):
    """By case: output, gradient of the input, and those of all parameters, whole."""
    from ltrain.parallel.mesh import init_mesh

    mesh = init_mesh(context=world_size)
    found = {}
    for name, pattern in FOUND.items():
        for mode in MODES:
            elimination = make_elimination(SCORES, mode=mode, ratio=0.5, strata=4)
            level = "full" if mode == "backward" else "none"
            model = make_model(
                Path(folder) / "model", mesh, elimination, pattern=pattern, context=world_size,
                memory_level=level,
            )  # fmt: skip
            layer = model.decoder.layers[1].train()
            for documents in ("one", "packed"):
                doc_ids, tokens = DOCUMENTS[documents]
                layout = SequenceLayout("striped", tokens, world_size, 8)
                make = torch.Generator().manual_seed(8)
                x, upstream = (torch.randn(tokens, 1, 32, generator=make, dtype=torch.float64) for _ in "xy")
                mine = layout.shard(x, rank, 0).requires_grad_()
                layer.zero_grad()
                out, _ = layer(mine, packed_seq_params=make_context(tokens, doc_ids, mesh=mesh))
                out.backward(layout.shard(upstream, rank, 0))
                place = layout.positions(rank).long()
                whole = torch.zeros(2, tokens, 1, 32, dtype=torch.float64)
                whole[:, place] = torch.stack((out.detach(), mine.grad))
                gradients = torch.cat([p.grad.flatten() for p in layer.parameters()])
                dist.all_reduce(whole)
                dist.all_reduce(gradients)
                found[name, mode, documents] = [*whole.numpy(), gradients.numpy()]
    return found


def test_two_ranks_compute_what_one_does(tmp_path):
    save_tiny(tmp_path / "model", "llama")
    one = run_ranks(_layers, 1, str(tmp_path))[0]
    two = run_ranks(_layers, 2, str(tmp_path))[0]
    for case, expected in one.items():
        for name, want, have in zip(("out", "dx", "parameters"), expected, two[case], strict=True):
            error = np.abs(have - want).max() / np.abs(want).max()
            assert error <= 1e-9, (case, name, error)
