"""Every memory level computes the stock layer's loss and gradients, and saves what it says."""

import pytest
import torch
from support.lean import TARGETS, batch, build_lean, loss_and_gradients, run
from support.models import save_tiny

from ltrain.config.base import ConfigError
from ltrain.metrics.saved import SavedBytes
from ltrain.model.families import read_spec
from ltrain.parallel.mesh import init_mesh, init_process_group
from ltrain.parallel.offload import HostStore

LEVELS = ("norms", "mlp", "full")
CASES = {
    "llama": {},
    "llama-mha-bias": {},
    "qwen2-window": {},
    "qwen3": {},
    "qwen3-lora": {"adapter": TARGETS},
    "llama-mha-bias-lora": {"adapter": TARGETS},
    "llama-lora-attention": {"adapter": ("qkv", "o")},
}


@pytest.fixture(scope="module")
def mesh():
    init_process_group(60)
    return init_mesh()


def _spec(tmp_path, variant):
    return read_spec(save_tiny(tmp_path / variant, variant))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_stock_layer(case, mesh, tmp_path):
    variant = case.split("-lora")[0]
    spec, options = _spec(tmp_path, variant), CASES[case]
    want_loss, want = None, None
    for level in ("none", *LEVELS):
        model = build_lean(tmp_path / variant, spec, mesh, level, **options)
        loss, gradients = loss_and_gradients(model, *batch(mesh))
        if want is None:
            want_loss, want = loss, gradients
            continue
        assert abs(loss - want_loss) <= 1e-12 * abs(want_loss), level
        assert gradients.keys() == want.keys(), level
        for name, gradient in gradients.items():
            error = (gradient - want[name]).norm() / want[name].norm().clamp_min(1e-30)
            assert error <= 1e-10, f"{level}: {name} differs by {error:.1e}"


def _layer(tmp_path, mesh, variant, level, dtype=torch.float64, **options):
    model = build_lean(tmp_path / variant, _spec(tmp_path, variant), mesh, level, dtype=dtype, **options)
    return model.decoder.layers[0]


@pytest.mark.parametrize("level", LEVELS)
def test_an_attention_half_over_some_rows(level, mesh, tmp_path):
    """Equal to stock modules on the gathered rows; other rows pass by; only kept rows are saved."""
    layer = _layer(tmp_path, mesh, "qwen3", level)
    _, _, whole = batch(mesh, num_tokens=160, documents=None)
    rows = torch.cat([torch.arange(16, 64), torch.arange(112, 128)])
    _, _, kept = batch(mesh, num_tokens=len(rows), documents=None)
    kept.rope_positions = whole.rope_positions[rows]
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(160, 1, layer.config.hidden_size, generator=generator).double() for _ in range(2))
    parameters = list(layer.parameters())

    ours = x.clone().requires_grad_()
    with SavedBytes(parameters) as saved:
        y, rebuild = layer.lean_attention(ours, kept, rows)
    assert torch.equal(rebuild.compute(*rebuild.inputs), y)
    spec = read_spec(tmp_path / "qwen3")
    per_row = spec.q_size + spec.num_heads + 1 + (level != "full") * (spec.q_size + 2 * spec.kv_size)
    assert saved.total == 8 * (160 * spec.hidden_size + len(rows) * per_row), "only x may have all rows"
    gradients = torch.autograd.grad(y, [ours, *parameters], dy, allow_unused=True)

    stock = x.clone().requires_grad_()
    out, bias = layer.self_attention(layer.input_layernorm(stock[rows]), None, packed_seq_params=kept)
    assert bias is None
    want = torch.autograd.grad(stock.index_add(0, rows, out), [stock, *parameters], dy, allow_unused=True)
    for have, expected in zip(gradients, want, strict=True):
        assert (have is None) == (expected is None)
        if have is not None:
            assert (have - expected).norm() <= 1e-10 * expected.norm()
    dropped = torch.ones(160, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(y[dropped], x[dropped]) and torch.equal(gradients[0][dropped], dy[dropped])


class _LateCopies:
    """Copies that happen as late as they may: a wait that is missing, or a buffer used too early, shows."""

    def __init__(self):
        self.queue, self.fetched, self.buffers = [], 0, 0

    def buffer(self, like):
        self.buffers += 1
        return torch.full_like(like, torch.nan)

    def out(self, host, x):
        self.queue.append((host, x.clone()))

    def back(self, host):
        self.fetched += 1
        x = torch.full_like(host, torch.nan)
        self.queue.append((x, host))
        return x, len(self.queue)

    def wait(self, x, ticket):
        for target, source in self.queue:
            target.copy_(source)
        self.queue.clear()


def test_offloaded_residuals_come_back_one_layer_ahead(mesh, tmp_path):
    spec = _spec(tmp_path, "llama")
    wanted = loss_and_gradients(build_lean(tmp_path, spec, mesh, "full"), *batch(mesh))
    model = build_lean(tmp_path, spec, mesh, "full")
    engine = _LateCopies()
    store = HostStore(engine)
    ahead = []
    for layer in model.decoder.layers:
        layer.lean_attention.store = store
        layer.lean_mlp.norm.register_forward_pre_hook(lambda *_: ahead.append(engine.fetched))
    for _ in range(2):
        loss, gradients = loss_and_gradients(model, *batch(mesh))
        assert loss == wanted[0] and not engine.queue
        assert all(torch.equal(gradients[name], value) for name, value in wanted[1].items())
    assert engine.fetched == 2 * 2 and engine.buffers == 2, "each residual once, in buffers used again"
    assert 1 not in ahead, "the first layer's residual is under way before the second layer works"
    with torch.no_grad():
        run(model, *batch(mesh))
    assert engine.fetched == 4 and engine.buffers == 2, "evaluation moves nothing"


def test_attention_modules_of_others_are_refused(mesh, tmp_path):
    from support.models import build

    with pytest.raises(TypeError, match="needs CoreAttention, not DenseAttention"):
        build(_spec(tmp_path, "llama"), mesh, memory_level="mlp")


def test_offload_without_a_gpu_is_refused(tmp_path):
    from support.tiny import tiny_tree

    from ltrain.config.load import validate
    from ltrain.train.plan import check_device

    with pytest.raises(ConfigError, match=r"memory\.level='offload' needs a GPU"):
        check_device(validate(tiny_tree(tmp_path, memory__level="offload")))
