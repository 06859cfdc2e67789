"""Compressed stage boundaries beside the uncompressed pipeline: outputs, all gradients, bytes."""

import hashlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from ltrain.config.base import ConfigError
from ltrain.parallel.stage_link import (
    Subspace,
    SubspaceEmbedding,
    SubspaceLinear,
    SubspaceLink,
    absorb_embedding_drift,
    project_writers,
)

VOCAB, HIDDEN, RANK = 50, 32, 8


def _space(seed: int = 7) -> Subspace:
    return Subspace(HIDDEN, RANK, seed)


class _Block(nn.Module):
    """Pre-norm residual block whose only writer stays in the subspace."""

    def __init__(self, space: Subspace) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 64)
        self.down = SubspaceLinear(64, space)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def _pipeline(space: Subspace) -> nn.ModuleList:
    torch.manual_seed(0)
    stages = nn.ModuleList([nn.Sequential(_Block(space), _Block(space)) for _ in range(3)])
    embedding = SubspaceEmbedding(space, VOCAB, 1.0)
    nn.init.normal_(embedding.weight)
    return nn.ModuleList([embedding, stages, nn.Linear(HIDDEN, VOCAB)])


def _run(model: nn.ModuleList, link: SubspaceLink | None, ids: torch.Tensor) -> tuple[torch.Tensor, list]:
    """Stage by stage, each boundary cut as between processes: a tensor crosses, and later its gradient."""
    embedding, stages, head = model
    x, cuts, crossed = embedding(ids), [], []
    for stage in stages[:-1]:
        z = stage(x) if link is None else link.send(stage(x))
        arrived = z.detach().requires_grad_()
        cuts.append((z, arrived))
        crossed.append(z.shape)
        x = arrived if link is None else link.receive(arrived, ids)
    loss = nn.functional.cross_entropy(head(stages[-1](x)).flatten(0, 1), ids.roll(-1, 1).flatten())
    loss.backward()
    for z, arrived in reversed(cuts):
        z.backward(arrived.grad)
    return loss, crossed


def _link(space: Subspace, model: nn.ModuleList) -> SubspaceLink:
    return SubspaceLink(space, model[0].anchors)


def test_stages_of_subspace_layers_lose_nothing():
    space = _space()
    ids = torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    plain, compressed = _pipeline(space), _pipeline(space)
    loss, shapes = _run(plain, None, ids)
    link = _link(space, compressed)
    other, small = _run(compressed, link, ids)
    assert abs(float(loss) - float(other)) <= 1e-5 * float(loss)
    for (name, p), q in zip(plain.named_parameters(), compressed.named_parameters(), strict=True):
        assert (p.grad - q[1].grad).norm() <= 1e-4 * p.grad.norm(), name
    assert shapes[0] == (3, 11, HIDDEN) and small[0] == (3, 11, RANK)
    assert link.bytes_sent == 2 * 2 * 3 * 11 * RANK * 4, "two boundaries, both ways"
    with torch.no_grad():
        assert link.loss_of(compressed[1][0](compressed[0](ids)), ids) <= 2e-5


def test_bfloat16_activations_lose_their_rounding_only():
    space = _space()
    model = _pipeline(space)
    ids = torch.arange(VOCAB)
    with torch.no_grad():
        x = model[1][0](model[0](ids)).bfloat16()
        assert 0 < _link(space, model).loss_of(x, ids) <= 5e-3


def test_the_constraint_holds_under_an_optimizer():
    space = _space()
    model = _pipeline(space)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    link = _link(space, model)
    ids = torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(float(_run(model, link, ids)[0].detach()))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    with torch.no_grad():
        assert link.loss_of(model[1][0](model[0](ids)), ids) <= 1e-5


def test_projection_of_free_layers_is_lossy_and_says_how_much():
    space = _space()
    anchors = space.random_anchors(VOCAB, 1.0)
    link = SubspaceLink(space, anchors)
    ids = torch.arange(20)
    x = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = (x - anchors[ids]) @ space.basis @ space.basis.t() + anchors[ids]
    torch.testing.assert_close(link.receive(link.send(x), ids), expected)
    assert link.loss_of(x, ids) > 0.3
    gradient = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    link.receive(link.send(x), ids).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ space.basis @ space.basis.t())


def test_a_trainable_gain_behind_the_writer_would_break_it():
    space = _space()
    anchors = space.random_anchors(VOCAB, 1.0)
    link = SubspaceLink(space, anchors)
    ids = torch.arange(20)
    inside = anchors[ids] + torch.randn(20, RANK) @ space.basis.t()
    assert link.loss_of(inside, ids) < 1e-6
    gain = 1 + 0.1 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))
    assert link.loss_of(anchors[ids] + (inside - anchors[ids]) * gain, ids) > 0.01


def test_basis_is_orthonormal_and_the_same_in_another_process():
    space = _space()
    torch.testing.assert_close(space.basis.t() @ space.basis, torch.eye(RANK), atol=1e-6, rtol=0)
    code = (
        "import torch; torch.set_num_threads(2); from ltrain.parallel.stage_link import Subspace;"
        f"print(Subspace({HIDDEN}, {RANK}, 7).digest)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == space.digest != _space(8).digest
    assert len(space.digest) == len(hashlib.sha256().hexdigest())


def test_project_writers_keeps_global_parameters_apart():
    space = _space()
    weights = [torch.randn(HIDDEN, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    theta = [w.clone() for w in weights]
    lost = project_writers(weights, space)
    assert 0.5 < lost < 1.0 and project_writers(weights, space) < 1e-6
    for weight, original in zip(weights, theta, strict=True):
        outside = weight - space.basis @ (space.basis.t() @ weight)
        assert outside.norm() <= 1e-6 * original.norm()


def test_absorbed_drift_follows_the_published_equations():
    """T_S <- T_S U U^T and static <- static + (T_S - T_S U U^T), over several rounds."""
    space = _space()
    project = space.basis @ space.basis.t()
    table = torch.randn(VOCAB, HIDDEN)
    static = table - table @ project
    for seed in range(3):
        table = table + 0.1 * torch.randn(table.shape, generator=torch.Generator().manual_seed(seed))
        learned = table - static
        static = static + (learned - learned @ project)
        torch.testing.assert_close(absorb_embedding_drift(table, space), static, atol=1e-5, rtol=0)
        assert (static @ space.basis).abs().max() < 1e-5


def test_wrong_ranks_are_refused():
    for rank in (0, HIDDEN + 1):
        with pytest.raises(ConfigError, match="rank"):
            Subspace(HIDDEN, rank, 0)
