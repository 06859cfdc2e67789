"""`build_sync` as the trainer uses it: replicas as threads, real frames between them."""

import copy
import threading

import pytest
import torch

from ltrain.config.base import ConfigError
from ltrain.config.sync import DiLoCo, EveryStep, SparseLoCo
from ltrain.metrics.names import is_known
from ltrain.sync.exchange import LocalHub, Outcome
from ltrain.sync.frame import RunIdentity, read_frame, write_frame
from ltrain.sync.methods import build_sync, run_identity
from ltrain.sync.payload import PayloadError


def _model(seed: int = 0) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    # Its own generator: replicas are threads.
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def _batch(step: int, replica: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + replica)
    x = torch.randn(8, 12, generator=generator)
    return x, x[:, :3].sin()


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.data for name, p in model.named_parameters()}


def _train(config, replicas: int, steps: int, resume_at: int | None = None, optimizer=torch.optim.AdamW):
    """Train `replicas` threads; returns models and reports. At `resume_at` all start from their state."""
    identity = run_identity(config, _parameters(_model()))
    hub = LocalHub([f"r{i}" for i in range(replicas)], identity)
    models, reports, failures = {}, {}, []

    def replica(i: int) -> None:
        try:
            model = _model()
            inner = optimizer(model.parameters(), lr=0.01)
            sync = build_sync(config, _parameters(model), exchange=hub.exchange(f"r{i}"))
            reports[i] = []
            for step in range(steps):
                if step == resume_at:
                    state = copy.deepcopy((sync.state_dict(), model.state_dict(), inner.state_dict()))
                    model = _model(seed=5)
                    inner = optimizer(model.parameters(), lr=0.01)
                    model.load_state_dict(state[1])
                    inner.load_state_dict(state[2])
                    sync = build_sync(config, _parameters(model), exchange=hub.exchange(f"r{i}"))
                    sync.load_state_dict(state[0])
                x, y = _batch(step, i)
                inner.zero_grad()
                (model(x) - y).square().mean().backward()
                sync.reduce_gradients({name: p.grad for name, p in model.named_parameters()})
                inner.step()
                report = sync.after_step(step)
                if report is not None:
                    reports[i].append(report)
            sync.finish()
            models[i] = model
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=replica, args=(i,)) for i in range(replicas)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [models[i] for i in range(replicas)], reports


def _equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def _data_parallel(replicas: int, steps: int, optimizer) -> torch.nn.Module:
    model = _model()
    inner = optimizer(model.parameters(), lr=0.01)
    for step in range(steps):
        inner.zero_grad()
        for i in range(replicas):
            x, y = _batch(step, i)
            ((model(x) - y).square().mean() / replicas).backward()
        inner.step()
    return model


def test_every_step_is_data_parallel():
    models, _ = _train(EveryStep(), 3, 8)
    assert _equal(models[0], models[1]) and _equal(models[0], models[2])
    for p, q in zip(
        models[0].parameters(), _data_parallel(3, 8, torch.optim.AdamW).parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_density_one_without_quantisation_every_step_is_data_parallel():
    config = SparseLoCo(density=1.0, bits=32, steps_per_round=1)
    models, _ = _train(config, 3, 12, optimizer=torch.optim.SGD)
    assert _equal(models[0], models[1]) and _equal(models[0], models[2])
    for p, q in zip(models[0].parameters(), _data_parallel(3, 12, torch.optim.SGD).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("overlap", ["none", "delayed"])
@pytest.mark.parametrize("kind", [SparseLoCo, DiLoCo])
def test_rounds_come_every_h_steps_and_end_with_equal_replicas(kind, overlap):
    models, reports = _train(kind(steps_per_round=3, overlap=overlap), 2, 10)
    assert _equal(models[0], models[1])
    # The delayed form hears of a round one round later.
    assert [r.round for r in reports[0]] == ([1, 2, 3] if overlap == "none" else [1, 2])
    metrics = reports[0][0].metrics
    assert metrics["sync/peers"] == 2 and metrics["sync/included"] == 1 and metrics["sync/drift"] > 0
    assert all(is_known(name) for name in metrics), sorted(metrics)


@pytest.mark.parametrize("resume_at", [3, 4])
@pytest.mark.parametrize("overlap", ["none", "delayed"])
def test_a_resumed_run_is_bitwise_the_same(overlap, resume_at):
    """In the middle of a round, and between rounds with one in flight."""
    config = SparseLoCo(steps_per_round=3, density=0.1, bits=1, chunk=64, overlap=overlap)
    straight, _ = _train(config, 2, 9)
    resumed, _ = _train(config, 2, 9, resume_at=resume_at)
    assert _equal(straight[0], resumed[0]) and _equal(straight[1], resumed[1])


def test_losing_the_error_buffer_at_a_resume_would_be_seen():
    config = SparseLoCo(steps_per_round=1, density=0.1, bits=1, chunk=64)
    model = _model()
    hub = LocalHub(["a"], run_identity(config, _parameters(model)))
    sync = build_sync(config, _parameters(model), exchange=hub.exchange("a"))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    sync.after_step(0)
    assert any(error.abs().sum() > 0 for error in sync.state_dict()["error"].values())


def test_without_peers_every_step_needs_nothing_and_rounds_are_refused():
    gradient = {"w": torch.ones(2)}
    sync = build_sync(EveryStep(), {"w": torch.zeros(2)})
    assert sync.reduce_gradients(gradient) == {} and sync.after_step(0) is None and sync.finish() is None
    assert gradient["w"].tolist() == [1.0, 1.0]
    with pytest.raises(ConfigError, match=r"sync\.peers"):
        build_sync(SparseLoCo(), {"w": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"sync\.parameters"):
        build_sync(EveryStep(), {})


def test_a_frame_of_another_round_run_or_model_is_refused_by_name():
    config = SparseLoCo(density=0.1)
    tensors = {"w": torch.randn(100), "b": torch.randn(7)}
    identity = run_identity(config, tensors)
    hub = LocalHub(["a"], identity)
    sync = build_sync(config, {n: t.clone() for n, t in tensors.items()}, exchange=hub.exchange("a"))
    payloads = sync.outer.contribute()
    frame = write_frame(identity, "all", 4, payloads)
    assert set(read_frame(identity, "all", 4, frame)) == {"w", "b"}
    other = run_identity(config.model_copy(update={"chunk": 1024}), tensors)
    shape = RunIdentity(identity.fields, {"all": {"w": (50, 2), "b": (7,)}})
    fewer = RunIdentity(identity.fields, {"all": {"w": (100,)}})
    for who, round_, data, word in (
        (identity, 5, frame, "round is 4, expected 5"),
        (other, 4, frame, "run"),
        (shape, 4, frame, "shape"),
        (fewer, 4, frame, "tensors"),
        (identity, 4, frame[:-1], "length"),
        (identity, 4, frame[:20], "too few"),
        (identity, 4, bytes(len(frame)), "magic"),
    ):
        with pytest.raises(PayloadError, match=word):
            read_frame(who, "all", round_, data)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        at = int(torch.randint(len(frame), (1,), generator=generator))
        damaged = bytearray(frame)
        damaged[at] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        with pytest.raises(PayloadError):
            read_frame(identity, "all", 4, bytes(damaged))


def test_a_commit_out_of_order_is_our_bug():
    config = SparseLoCo(steps_per_round=1)
    tensors = {"w": torch.zeros(4)}
    exchange = LocalHub(["a"], run_identity(config, tensors)).exchange("a")
    finish = exchange.finish

    def wrong() -> Outcome:
        outcome = finish()
        outcome.commits = outcome.commits * 2
        return outcome

    exchange.finish = wrong
    with pytest.raises(RuntimeError, match="cannot follow"):
        build_sync(config, tensors, exchange=exchange).after_step(0)
