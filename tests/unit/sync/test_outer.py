"""Laws of a round: exactness, conservation, equal replicas, gain, resume."""

import itertools

import pytest
import torch
from pydantic import ValidationError

from ltrain.config.base import ConfigError
from ltrain.config.sync import DiLoCo, EveryStep, SparseLoCo, check_sync
from ltrain.sync import Payload, decompress
from ltrain.sync.aggregate import aggregate, gain_of
from ltrain.sync.compress import compress
from ltrain.sync.outer import OuterState

EXACT = {"density": 1.0, "bits": 32, "steps_per_round": 1, "outer_lr": 1.0}


def _parameters(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (128, 64), "bias": (130,), "scalar": ()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _replicas(config, count: int = 3) -> list[OuterState]:
    return [OuterState(config, {n: p.clone() for n, p in _parameters().items()}) for _ in range(count)]


def _move(state: OuterState, seed: int, scale: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in state.parameters.values():
        p.add_(torch.randn(p.shape, generator=generator), alpha=scale)


def _round(states: list[OuterState], order=None, members=None) -> None:
    sent = {f"r{i}": state.contribute() for i, state in enumerate(states)}
    members = members if members is not None else list(sent)
    for i, state in enumerate(states):
        if f"r{i}" not in members:
            state.missed()
        state.apply({name: sent[name] for name in (order or members) if name in members})
        if not state.delayed:
            state.reset_parameters()


@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_density_one_is_plain_data_parallel(decay):
    """H=1, SGD inside, outer rate 1: the parameters of a data-parallel SGD run on the mean gradient."""
    config = SparseLoCo(**EXACT, error_decay=decay)
    states = _replicas(config)
    reference = _parameters()
    for step in range(10):
        gradients = [_parameters(seed=100 * step + i) for i in range(3)]
        for state, gradient in zip(states, gradients, strict=True):
            for name, p in state.parameters.items():
                p.sub_(0.1 * gradient[name])
        _round(states)
        for name, p in reference.items():
            p.sub_(0.1 * sum(gradient[name] for gradient in gradients) / 3)
            torch.testing.assert_close(states[0].parameters[name], p, rtol=0, atol=1e-6)
        assert all(not error.any() for error in states[0].error.values())


def test_one_replica_keeps_its_own_result():
    state = _replicas(SparseLoCo(**EXACT), 1)[0]
    for step in range(5):
        _move(state, step)
        local = {name: p.clone() for name, p in state.parameters.items()}
        _round([state])
        for name, p in state.parameters.items():
            torch.testing.assert_close(p, local[name], rtol=0, atol=5e-7)


@pytest.mark.parametrize("bits", [1, 2, 16, 32])
@pytest.mark.parametrize("blocks", ["square", "runs"])
def test_sent_plus_kept_is_decayed_error_plus_progress(bits, blocks):
    state = _replicas(SparseLoCo(bits=bits, blocks=blocks, density=0.05), 1)[0]
    for step in range(4):
        _move(state, step)
        before = {name: error.clone() for name, error in state.error.items()}
        total = {name: before[name] * 0.95 + (state.theta[name] - p) for name, p in state.parameters.items()}
        sent = {name: decompress(payload) for name, payload in state.contribute().items()}
        for name, a in total.items():
            unsent = sent[name] == 0
            assert torch.equal(state.error[name][unsent], a[unsent])
            assert torch.equal(state.error[name], a - sent[name])
            # One rounding of the subtraction, at the size of what was subtracted.
            ulp = 2.0**-24 * (sent[name].abs() + a.abs()).double() + 2.0**-149
            lost = sent[name].double() + state.error[name].double() - a.double()
            assert bool((lost.abs() <= ulp).all())
            if bits == 32:
                assert not state.error[name][~unsent].any()
        state.apply({})
        state.reset_parameters()


@pytest.mark.parametrize(
    "config",
    [
        SparseLoCo(density=0.05, bits=1),
        SparseLoCo(density=0.05, bits=2, aggregation="senders", gain=1.0, clip_to_median=True),
        DiLoCo(),
        DiLoCo(gain=1.0, outer_momentum=0.5, nesterov=False, bits=16),
    ],
    ids=["sign", "table", "diloco", "momentum"],
)
def test_any_order_of_arrival_gives_the_same_bits(config):
    orders = list(itertools.permutations([f"r{i}" for i in range(4)]))[::5]
    states = [_replicas(config, 4) for _ in orders]
    for step in range(4):
        for group, order in zip(states, orders, strict=True):
            torch.set_num_threads(1 + step % 2)
            for i, state in enumerate(group):
                _move(state, 10 * step + i)
            _round(group, order)
    assert len({state.digest() for group in states for state in group}) == 1
    for state in states[0]:
        assert all(torch.equal(p, state.theta[name]) for name, p in state.parameters.items())
    assert states[0][0].digest() != _replicas(config, 1)[0].digest()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_missed_round_returns_the_configured_share(share):
    states = _replicas(SparseLoCo(density=0.05, bits=1, restore_missed=share), 2)
    _move(states[0], 0)
    _move(states[1], 1)
    total = {n: states[1].theta[n] - p for n, p in states[1].parameters.items()}
    sent = {n: decompress(p) for n, p in states[1].contribute().items()}
    theirs = states[0].contribute()
    states[1].missed()
    for state in states:
        state.apply({"r0": theirs})
    assert states[0].digest() == states[1].digest()
    for name, a in total.items():
        expected = a - (1 - share) * sent[name]
        torch.testing.assert_close(states[1].error[name], expected, rtol=1e-6, atol=1e-9)


def test_an_empty_round_counts_and_changes_nothing():
    states = _replicas(SparseLoCo(density=0.05), 2)
    before = states[0].digest()
    _move(states[0], 0)
    _round(states, members=[])
    assert states[0].digest() == before and states[0].round == 1
    assert torch.equal(states[0].parameters["weight"], states[0].theta["weight"])


def test_mean_and_senders_by_hand():
    x = torch.tensor([4.0, 0.0, 0.0, 1.0])
    y = torch.tensor([2.0, 8.0, 0.0, 0.0])
    sent = {n: compress(t, density=0.5, bits=32, chunk=4) for n, t in (("x", x), ("y", y))}
    mean = aggregate(sent, "mean", False, torch.device("cpu"))
    assert mean.update.tolist() == [3.0, 4.0, 0.0, 0.5]
    senders = aggregate(sent, "senders", False, torch.device("cpu"))
    assert senders.update.tolist() == [3.0, 8.0, 0.0, 1.0]
    assert (senders.num_values, senders.touched, senders.replicas, senders.interval) == (4, 3, 2, 2)
    clipped = aggregate({"x": sent["x"], "y": sent["y"], "z": sent["x"]}, "mean", True, torch.device("cpu"))
    factor = (17.0 / 68.0) ** 0.5
    torch.testing.assert_close(clipped.update[1], torch.tensor(8 * factor / 3))


def test_gain_law():
    assert gain_of(1, 0.95) == 1.0
    assert gain_of(64, 0.95) == pytest.approx((1 - 0.95**64) / 0.05 / 64)
    assert round(gain_of(64, 0.95), 2) == 0.30 and round(gain_of(256, 0.95), 3) == 0.078


@pytest.mark.parametrize("rule", ["mean", "senders"])
@pytest.mark.parametrize(("count", "density"), [(2, 1 / 8), (4, 1 / 8), (3, 1 / 16)])
def test_gain_does_not_depend_on_replicas_density_or_rule(rule, count, density):
    """A constant drift of delta a round moves theta by gain x delta a round, once the buffers are full."""
    config = SparseLoCo(density=density, bits=32, chunk=256, aggregation=rule, gain=1.0, max_outer_lr=50.0)
    generator = torch.Generator().manual_seed(0)
    start = torch.zeros(2048)
    drift = 1e-3 * (1 + 0.1 * torch.rand(2048, generator=generator))
    states = [OuterState(config, {"w": start.clone()}) for _ in range(count)]
    for state in states:
        state.error["w"].copy_(0.01 * torch.rand(2048, generator=generator))
    rounds, at = 8 * round(1 / density), 0.0
    for step in range(rounds):
        for state in states:
            state.parameters["w"].sub_(drift)
        _round(states)
        if step == rounds // 2 - 1:
            at = float(states[0].theta["w"].sum())
    moved = (at - float(states[0].theta["w"].sum())) / (rounds - rounds // 2)
    assert moved / float(drift.sum()) == pytest.approx(1.0, abs=0.12)


def test_diloco_is_nesterov_on_the_mean():
    states = _replicas(DiLoCo(), 2)
    name = "weight"
    reference = torch.nn.Parameter(_parameters()[name].clone())
    optimizer = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
    for step in range(5):
        for i, state in enumerate(states):
            _move(state, 2 * step + i)
        reference.grad = sum(s.theta[name] - s.parameters[name] for s in states) / 2
        optimizer.step()
        _round(states)
        torch.testing.assert_close(states[0].theta[name], reference.detach(), rtol=1e-6, atol=1e-6)


def test_delayed_updates_lose_no_progress():
    """Dense and exact, delayed by a round: after the last update all progress has arrived once."""
    states = _replicas(SparseLoCo(**EXACT, overlap="delayed"), 2)
    total = {name: torch.zeros_like(p) for name, p in states[0].theta.items()}
    sent = None
    for step in range(6):
        for i, state in enumerate(states):
            before = {name: p.clone() for name, p in state.parameters.items()}
            _move(state, 10 * step + i)
            for name, p in state.parameters.items():
                total[name] += (p - before[name]) / 2
        if sent is not None:
            for state in states:
                state.apply(sent)
        sent = {f"r{i}": state.contribute() for i, state in enumerate(states)}
    for state in states:
        state.apply(sent)
        state.reset_parameters()
    assert states[0].digest() == states[1].digest()
    for name, start in _parameters().items():
        torch.testing.assert_close(states[0].parameters[name], start + total[name], rtol=0, atol=2e-6)


def test_narrow_parameters_do_not_send_their_rounding():
    state = OuterState(SparseLoCo(**EXACT), {"w": _parameters()["weight"].bfloat16()})
    state.theta["w"].add_(1e-4)
    state.reset_parameters()
    assert not decompress(state.contribute()["w"]).any()


def test_state_dict_resumes_bit_for_bit():
    for config in (SparseLoCo(density=0.05, overlap="delayed"), DiLoCo()):
        straight, resumed = _replicas(config, 2), _replicas(config, 2)
        for step in range(6):
            if step == 3:
                fresh = _replicas(config, 2)
                for old, new in zip(resumed, fresh, strict=True):
                    new.load_state_dict(old.state_dict())
                    for name, p in new.parameters.items():
                        p.copy_(old.parameters[name])
                resumed = fresh
            for group in (straight, resumed):
                for i, state in enumerate(group):
                    _move(state, 10 * step + i)
                _round(group)
        for a, b in zip(straight, resumed, strict=True):
            assert a.digest() == b.digest() and a.round == b.round == 6
            assert all(torch.equal(a.error[n], b.error[n]) for n in a.error)
            assert all(torch.equal(a.parameters[n], b.parameters[n]) for n in a.parameters)


def test_state_of_another_model_is_refused():
    state = _replicas(SparseLoCo(), 1)[0]
    other = OuterState(SparseLoCo(), {"weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="bias"):
        state.load_state_dict(other.state_dict())
    wrong = state.state_dict()
    wrong["error"]["bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match="shape"):
        state.load_state_dict(wrong)


def test_a_parameter_that_is_not_finite_is_refused_before_anything_changes():
    state = _replicas(SparseLoCo(), 1)[0]
    _move(state, 0)
    state.parameters["scalar"].fill_(float("nan"))
    with pytest.raises(ValueError, match="scalar"):
        state.contribute()
    assert not any(error.any() for error in state.error.values())


@pytest.mark.parametrize(
    "wrong",
    [{"density": 0.0}, {"density": 1.1}, {"steps_per_round": 0}, {"bits": 3}, {"error_decay": 1.5},
     {"outer_lr": 0.0}, {"aggregation": "sum"}, {"unknown": 1}, {"gain": -1.0}],
)  # fmt: skip
def test_fields_out_of_range(wrong):
    with pytest.raises(ValidationError):
        SparseLoCo(**wrong)


def test_cross_field_rules(tmp_path):
    peers = {"rendezvous": "127.0.0.1:1", "token_file": str(tmp_path / "t"), "replica": "a"}
    check_sync(EveryStep())
    check_sync(SparseLoCo(peers=peers, adapt=True, target_round_s=60.0))
    for config, field in (
        (SparseLoCo(), "sync.peers"),
        (DiLoCo(peers=peers | {"rendezvous": "nowhere"}), "sync.peers.rendezvous"),
        (DiLoCo(peers=peers | {"min_wait_s": 700.0}), "sync.peers.min_wait_s"),
        (SparseLoCo(peers=peers, adapt=True), "sync.target_round_s"),
        (SparseLoCo(peers=peers, target_round_s=9.0), "sync.target_round_s"),
        (SparseLoCo(peers=peers, density=0.001, chunk=64), "sync.density"),
    ):
        with pytest.raises(ConfigError, match=field):
            check_sync(config)


def test_payload_is_what_the_contract_names():
    payload = OuterState(SparseLoCo(), {"w": torch.ones(8)}).contribute()["w"]
    assert isinstance(payload, Payload)


def test_a_fetched_state_replaces_all_but_the_error_buffers():
    for config in (SparseLoCo(density=0.05, bits=1), DiLoCo(overlap="delayed")):
        source, behind = _replicas(config, 1)[0], _replicas(config, 1)[0]
        for step in range(3):
            _move(source, step)
            _round([source])
        _move(behind, 9)
        behind.contribute()
        kept = {name: error.clone() for name, error in behind.error.items()}
        behind.load_global_state({n: t.clone() for n, t in source.global_state().items()}, source.round)
        assert behind.digest() == source.digest() and behind.round == 3
        assert all(torch.equal(behind.error[name], error) for name, error in kept.items())
        assert all(torch.equal(behind.momentum[n], m) for n, m in source.momentum.items())
        assert all(torch.equal(p, behind.theta[n]) for n, p in behind.parameters.items())
