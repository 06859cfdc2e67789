import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.distributed import run_ranks

from ltrain.model.loss import IGNORE, chunked_cross_entropy


def _plain(hidden, weight, labels, vocab, z_loss=0.0):
    logits = (hidden @ weight[:vocab].t()).double()
    nll = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    log_z = torch.logsumexp(logits, 1).masked_fill(labels == IGNORE, 0)
    return nll.sum() + z_loss * log_z.square().sum(), nll


@pytest.mark.parametrize("tokens,chunk", [(63, 16), (1, 8), (40, 64)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_equals_the_whole_logits_version(tokens, chunk, z_loss):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 24, dtype=torch.float32, requires_grad=True)
    weight = torch.randn(101, 24, requires_grad=True)
    labels = torch.randint(0, 97, (tokens,))
    labels[::5] = IGNORE
    total, nll = chunked_cross_entropy(hidden, weight, labels, vocab_size=97, chunk=chunk, z_loss=z_loss)
    (3 * total).backward()
    got = (hidden.grad.clone(), weight.grad.clone())
    hidden.grad = weight.grad = None
    want_total, want_nll = _plain(hidden, weight, labels, 97, z_loss)
    (3 * want_total).backward()
    torch.testing.assert_close(total.double(), want_total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll.double(), want_nll, rtol=1e-5, atol=1e-5)
    for name, have, want in zip(("hidden", "weight"), got, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5, msg=name)
    assert torch.equal(got[1][97:], torch.zeros(4, 24))


@pytest.mark.parametrize("tokens", [0, 9])
def test_a_shard_without_targets_gives_zero(tokens):
    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    labels = torch.full((tokens,), IGNORE)
    total, nll = chunked_cross_entropy(hidden, weight, labels, chunk=4, z_loss=0.1)
    total.backward()
    assert total.item() == 0 and not nll.any()
    assert not hidden.grad.any() and not weight.grad.any()


def test_large_logits_do_not_overflow():
    hidden = torch.full((2, 4), 100.0, requires_grad=True)
    weight = torch.stack([torch.full((4,), 10.0), torch.full((4,), -10.0)]).requires_grad_()
    total, _ = chunked_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    total.backward()
    assert total.item() == pytest.approx(8000.0)
    assert torch.isfinite(hidden.grad).all()


def test_without_grad_nothing_is_saved():
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4)
    with torch.no_grad():
        total, _ = chunked_cross_entropy(hidden, weight, torch.zeros(5, dtype=torch.int64))
    assert not total.requires_grad


def _sharded(rank, world_size):
    torch.manual_seed(0)
    hidden = torch.randn(33, 16)
    weight = torch.randn(52, 16)
    labels = torch.randint(0, 50, (33,))
    labels[3] = IGNORE
    mine = weight.chunk(world_size)[rank].clone().requires_grad_()
    local = hidden.clone().requires_grad_()
    total, _ = chunked_cross_entropy(
        local,
        mine,
        labels,
        group=dist.group.WORLD,
        vocab_start=rank * 26,
        vocab_size=50,
        chunk=10,
        z_loss=1e-3,
    )
    total.backward()
    dist.all_reduce(local.grad)
    whole_hidden, whole_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    want, _ = _plain(whole_hidden, whole_weight, labels, 50, 1e-3)
    want.backward()
    return [
        float((total - want).abs() / want),
        float((local.grad - whole_hidden.grad).abs().max()),
        float((mine.grad - whole_weight.grad.chunk(world_size)[rank]).abs().max()),
    ]


def test_vocabulary_over_two_ranks():
    assert np.max(run_ranks(_sharded, 2)) < 1e-5
