"""Compressed stage boundaries beside the uncompressed pipeline: outputs, all gradients, bytes."""

import hashlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from ltrain.config.base import ConfigError
from ltrain.parallel.stage_link import (
    StageLink,
    Subspace,
    SubspaceEmbedding,
    SubspaceLinear,
    SubspaceLink,
    absorb_embedding_drift,
    build_stage_links,
    project_writers,
)

VOCAB, HIDDEN, RANK = 50, 32, 8


def _space(seed: int = 7) -> Subspace:
    return Subspace(HIDDEN, RANK, VOCAB, seed)


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
    return nn.ModuleList([SubspaceEmbedding(space), stages, nn.Linear(HIDDEN, VOCAB)])


def _run(model: nn.ModuleList, links: list[StageLink], ids: torch.Tensor) -> tuple[torch.Tensor, list]:
    """Stage by stage, each boundary cut as between processes: a tensor crosses, and later its gradient."""
    embedding, stages, head = model
    x, cuts, crossed = embedding(ids), [], []
    for stage, link in zip(stages[:-1], links, strict=True):
        z = link.send(stage(x), ids)
        arrived = z.detach().requires_grad_()
        cuts.append((z, arrived))
        crossed.append(z.shape)
        x = link.receive(arrived, ids)
    loss = nn.functional.cross_entropy(head(stages[-1](x)).flatten(0, 1), ids.roll(-1, 1).flatten())
    loss.backward()
    for z, arrived in reversed(cuts):
        z.backward(arrived.grad)
    return loss, crossed


@pytest.mark.parametrize(("wire", "forward", "backward"), [
    (torch.float32, 1e-5, 1e-4), (torch.bfloat16, 5e-3, 2e-2)])  # fmt: skip
def test_constrained_stages_lose_nothing(wire, forward, backward):
    space = _space()
    ids = torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    plain, compressed = _pipeline(space), _pipeline(space)
    loss, shapes = _run(plain, build_stage_links("identity", None, [True, True], hidden=HIDDEN), ids)
    links = build_stage_links("constrained", space, [True, True], hidden=HIDDEN, wire_dtype=wire)
    other, small = _run(compressed, links, ids)
    assert abs(float(loss) - float(other)) <= forward * float(loss)
    for (name, p), q in zip(plain.named_parameters(), compressed.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= backward * p.grad.norm(), name
    assert shapes[0] == (3, 11, HIDDEN) and small[0] == (3, 11, RANK)
    assert links[0].bytes_per_token() == RANK * wire.itemsize
    with torch.no_grad():
        assert links[0].check(compressed[1][0](compressed[0](ids)), ids) <= 2 * forward


def test_the_constraint_holds_under_an_optimizer():
    space = _space()
    model = _pipeline(space)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    links = build_stage_links("constrained", space, [True, True], hidden=HIDDEN)
    ids = torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(float(_run(model, links, ids)[0].detach()))
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
    with torch.no_grad():
        assert links[1].check(model[1][0](model[0](ids)), ids) <= 1e-5


def test_only_slow_links_are_compressed():
    links = build_stage_links("projection", _space(), [False, True, False], hidden=HIDDEN)
    assert [link.kind for link in links] == ["identity", "projection", "identity"]
    assert [link.width for link in links] == [HIDDEN, RANK, HIDDEN]


def test_projection_of_free_layers_is_lossy_and_says_how_much():
    space = _space()
    link = SubspaceLink(space, "projection")
    ids = torch.arange(20)
    x = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = (x - space.anchors[ids]) @ space.basis @ space.basis.t() + space.anchors[ids]
    torch.testing.assert_close(link(x, ids), expected)
    assert link.check(x, ids) > 0.3
    gradient = torch.randn(20, HIDDEN, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    link(x, ids).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ space.basis @ space.basis.t())


def test_a_trainable_gain_behind_the_writer_would_break_it():
    space = _space()
    link = SubspaceLink(space)
    ids = torch.arange(20)
    inside = space.anchors[ids] + torch.randn(20, RANK) @ space.basis.t()
    assert link.check(inside, ids) < 1e-6
    gain = 1 + 0.1 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(0))
    assert link.check(space.anchors[ids] + (inside - space.anchors[ids]) * gain, ids) > 0.01


def test_basis_is_orthonormal_and_the_same_in_another_process():
    space = _space()
    torch.testing.assert_close(space.basis.t() @ space.basis, torch.eye(RANK), atol=1e-6, rtol=0)
    code = (
        "import torch; torch.set_num_threads(2); from ltrain.parallel.stage_link import Subspace;"
        f"print(Subspace({HIDDEN}, {RANK}, {VOCAB}, 7).digest)"
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


def test_absorbed_drift_keeps_the_sum():
    space = _space()
    learned, static = torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN)
    total = learned + static
    absorb_embedding_drift(learned, static, space)
    torch.testing.assert_close(learned + static, total)
    assert (learned - learned @ space.basis @ space.basis.t()).norm() < 1e-5


def test_wrong_ranks_are_refused():
    for rank in (0, HIDDEN + 1):
        with pytest.raises(ConfigError, match="rank"):
            Subspace(HIDDEN, rank, VOCAB, 0)
    with pytest.raises(ConfigError, match="rank"):
        build_stage_links("constrained", None, [True], hidden=HIDDEN)
