"""Bytes in closed form against what autograd saves and what is alive at the peak."""

from dataclasses import replace

import pytest
import torch
from support.elimination import make_elimination
from support.lean import BLOCK, GATE, NSA, TARGETS, LateCopies, batch, build_lean, run
from support.live import LiveBytes
from support.models import save_tiny

from ltrain.attention import patterns
from ltrain.config.model import LoraAdapter
from ltrain.metrics.saved import SavedBytes
from ltrain.model.families import read_spec
from ltrain.model.layer_bytes import saved_bytes
from ltrain.model.memory import (
    LEVELS,
    Setting,
    bytes_per_token_layer,
    estimate_memory,
    longest_context,
    workspace_bytes,
)
from ltrain.parallel.mesh import init_mesh, init_process_group
from ltrain.parallel.offload import HostStore

TOKENS = 160
HERE = LEVELS[:-1]  # the last one, offload, needs a GPU


@pytest.fixture(scope="module")
def mesh():
    init_process_group(60)
    return init_mesh()


@pytest.mark.parametrize("variant", ["llama", "llama-mha-bias", "qwen2", "qwen3"])
def test_the_formula_is_what_autograd_saves(variant, mesh, tmp_path):
    spec = read_spec(save_tiny(tmp_path / variant, variant))
    for level in HERE:
        for dtype in (torch.float32, torch.bfloat16):
            for adapter in (None, ("qkv", "o"), TARGETS):
                model = build_lean(tmp_path / variant, spec, mesh, level, adapter=adapter, dtype=dtype)
                _, _, context = batch(mesh, num_tokens=TOKENS, documents=None)
                context.rope_tables = spec.rope.tables(context.rope_positions)
                x = torch.randn(TOKENS, 1, spec.hidden_size, dtype=dtype, requires_grad=True)
                with SavedBytes([*model.parameters(), *context.rope_tables]) as saved:
                    y, _ = model.decoder.layers[0](x, packed_seq_params=context)
                lora = LoraAdapter(rank=3, targets=adapter) if adapter else None
                said = saved_bytes(spec, level, dtype.itemsize, adapter=lora, fused_norm=False)
                assert saved.total == said.total * TOKENS, (level, dtype, adapter)
                y.sum().backward()
                assert x.grad is not None


@pytest.mark.parametrize("pattern", [patterns.nsa(**NSA), patterns.seer_gate(**GATE)], ids=["nsa", "gate"])
def test_the_formula_is_what_a_learned_pattern_saves(pattern, mesh, tmp_path):
    spec = read_spec(save_tiny(tmp_path / "qwen3", "qwen3"))
    for level in HERE:
        for dtype in (torch.float32, torch.bfloat16):
            model = build_lean(tmp_path / "qwen3", spec, mesh, level, pattern=pattern, dtype=dtype)
            _, _, context = batch(mesh, num_tokens=TOKENS, documents=None)
            context.rope_tables = spec.rope.tables(context.rope_positions)
            x = torch.randn(TOKENS, 1, spec.hidden_size, dtype=dtype, requires_grad=True)
            with SavedBytes([*model.parameters(), *context.rope_tables]) as saved:
                y, _ = model.decoder.layers[0](x, packed_seq_params=context)
            said = saved_bytes(spec, level, dtype.itemsize, fused_norm=False, pattern=pattern, block=BLOCK)
            assert saved.total == pytest.approx(said.total * TOKENS + said.fixed, abs=1), (level, dtype)
            assert y.requires_grad


def test_an_estimate_counts_the_layers_that_learn(tmp_path):
    spec = read_spec(save_tiny(tmp_path, "llama"))
    plain, nsa = Setting("mlp"), Setting("mlp", pattern=patterns.nsa(dense_layers=(1,)), context=4)
    q, k, n = spec.q_size, spec.kv_size, spec.num_heads
    more = 2 * (2 * q + 3 * n) + 8 * n + 2 * 2 * k * 4 / 32
    assert bytes_per_token_layer(spec, nsa) - bytes_per_token_layer(spec, plain) == more / 2
    gate = replace(plain, pattern=patterns.seer_gate(gate_dim=4), tensor=2, pipeline=2)
    grown = estimate_memory(spec, 64, gate).activations
    grown -= estimate_memory(spec, 64, replace(gate, pattern=None)).activations
    assert grown == 2 * 6 * k * 4 / 2 * 2, "both micro-batches of the first stage keep half of the heads"


SPARSE = [("llama", None), ("qwen3", None), ("qwen3", ("qkv", "o")), ("llama", TARGETS)]


@pytest.mark.parametrize("variant,adapter", SPARSE)
@pytest.mark.parametrize("mode", ["qkv", "q", "layer", "backward"])
def test_the_formula_is_what_a_layer_with_elimination_saves(mode, variant, adapter, mesh, tmp_path):
    spec = read_spec(save_tiny(tmp_path / variant, variant))
    lora = LoraAdapter(rank=3, targets=adapter) if adapter else None
    for level in LEVELS:
        for dtype in (torch.float32, torch.bfloat16):
            elimination = make_elimination(torch.arange(10.0), block=BLOCK, mode=mode, ratio=0.4)
            # On a CPU the level offload is full with another place for the residual.
            built = "full" if level == "offload" else level
            model = build_lean(
                tmp_path / variant, spec, mesh, built, adapter=adapter, dtype=dtype, elimination=elimination
            )
            layer = model.decoder.layers[1].train()
            copies = LateCopies()
            if level == "offload":
                layer.lean_attention.store = HostStore(copies)
            _, _, context = batch(mesh, num_tokens=TOKENS, documents=None)
            context.rope_tables = spec.rope.tables(context.rope_positions)
            x = torch.randn(TOKENS, 1, spec.hidden_size, dtype=dtype, requires_grad=True)
            with SavedBytes([*model.parameters(), *context.rope_tables]) as saved:
                y, _ = layer(x, packed_seq_params=context)
            said = saved_bytes(
                spec, level, dtype.itemsize, kept=0.4, mode=mode, adapter=lora, fused_norm=False
            )
            assert context.eliminated[1][0] == 0.4
            for found, wanted in ((saved.total, said.total), (copies.nbytes, said.host)):
                assert found == pytest.approx(wanted * TOKENS), (level, dtype)
            y.sum().backward()
            assert x.grad is not None
            del y
            assert saved.total == 0, "what no graph holds any more doesn't count"


def _peak(folder, spec, mesh, level):
    """(bytes alive at the peak of a step, and between forward and backward), without parameters."""
    model = build_lean(folder, spec, mesh, level, dtype=torch.float32, loss_chunk_tokens=16)
    tokens, labels, context = batch(mesh, num_tokens=512, documents=None)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        loss = run(model, tokens, labels, context)
        between = live.now
        loss.backward()
    return live.peak, between


@pytest.mark.parametrize("variant", ["llama"])
def test_the_measured_peak_grows_by_the_formula(variant, mesh, tmp_path):
    """Two layers more raise the peak by what two layers save; above that lies one layer's workspace."""
    peaks = {}
    for layers in (2, 4):
        folder = save_tiny(tmp_path / str(layers), variant, num_hidden_layers=layers)
        spec = read_spec(folder)
        for level in HERE:
            peaks[layers, level] = _peak(folder, spec, mesh, level)
    for level in HERE:
        said = 2 * 512 * saved_bytes(spec, level, 4, fused_norm=False).total
        growth = peaks[4, level][1] - peaks[2, level][1]
        assert abs(growth - said) <= 0.01 * said, f"{level}: {growth} bytes live, {said} by formula"
        growth = peaks[4, level][0] - peaks[2, level][0]
        assert abs(growth - said) <= 0.03 * said, f"{level}: the peak grew by {growth}, formula {said}"
        above = peaks[4, level][0] - peaks[4, level][1]
        workspace = workspace_bytes(spec, 512, Setting(level, bf16=False))
        assert workspace / 2 <= above <= 2 * workspace, f"{level}: {above} bytes, {workspace} by formula"
    order = [peaks[4, level][0] for level in HERE]
    assert order == sorted(order, reverse=True)


def test_the_longest_context_is_the_last_that_fits(tmp_path):
    spec = read_spec(save_tiny(tmp_path, "llama", num_hidden_layers=8))
    previous = 0
    for level in LEVELS:
        setting = Setting(level, tensor=2, pipeline=2)
        longest = longest_context(spec, 1 << 30, 4, setting)
        assert estimate_memory(spec, longest // 4, setting).total <= 1 << 30
        assert estimate_memory(spec, longest // 4 + 1, setting).total > 1 << 30
        assert longest > previous
        previous = longest
    assert longest_context(spec, 1000, 4, Setting()) == 0


def test_sequence_parallelism_shards_the_residual(tmp_path):
    spec = read_spec(save_tiny(tmp_path, "llama"))
    layer = saved_bytes(spec, "mlp", 2)
    assert layer.on_rank(2, True) == layer.total / 2
    assert layer.on_rank(2, False) == layer.residual + layer.parallel / 2
    sparse = replace(Setting("mlp"), kept=[1.0, 0.5])
    dense, half = (saved_bytes(spec, "mlp", 2, kept=share).total for share in (1.0, 0.5))
    assert bytes_per_token_layer(spec, sparse) == (dense + half) / 2
