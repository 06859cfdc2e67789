"""Adapters: the base model at the start, equal training over layouts, merged and PEFT exports alike."""

import numpy as np
import torch
from safetensors.torch import load_file
from support.distributed import run_ranks
from support.models import build, hf_logits, save_tiny

from ltrain.config.model import HFModel, LoraAdapter
from ltrain.model.families import read_spec
from ltrain.model.freeze import freeze_parameters
from ltrain.model.lora import init_adapter
from ltrain.model.weights import export_adapter, export_model, import_model
from ltrain.parallel.mesh import init_mesh

LORA = LoraAdapter(rank=3, alpha=6.0, targets=("qkv", "o", "gate_up", "down"))
VARIANT = "llama-mha-bias"


def _loss(model, tensor):
    """A loss whose gradient differs by token; every tensor-parallel rank has its part of the logits."""
    tokens = torch.arange(40).unsqueeze(0)
    logits = model(input_ids=tokens, position_ids=None, attention_mask=None)
    columns = torch.arange(logits.shape[-1]) + tensor.rank * logits.shape[-1]
    weights = torch.sin(columns + torch.arange(40)[:, None]) * (columns < 131)
    return (logits.float() * weights).sum() / 40


def _train(rank, world_size, folder):
    """Steps by hand on the adapters: one rank, TP 2 without and with sequence parallelism."""
    for name, tensor, sequence_parallel in (("one", 1, False), ("tp", 2, False), ("sp", 2, True)):
        mesh = init_mesh(tensor=tensor)
        spec = read_spec(folder / "in")
        config = HFModel(path=folder / "in", adapter=LORA)
        model = build(spec, mesh, lora=LORA, sequence_parallel=sequence_parallel)
        import_model(model, spec, mesh)
        init_adapter(model, spec, LORA, mesh, seed=3)
        freeze_parameters(model, spec, config, mesh)
        if name == "one":
            export_model(model, spec, mesh, folder / "start")
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in n for n in trained)
        for _ in range(2):  # B moves first, then A has a gradient too
            _loss(model, mesh.tensor).backward()
            for parameter in trained.values():
                if tensor > 1 and getattr(parameter, "sequence_parallel", False):
                    torch.distributed.all_reduce(parameter.grad, group=mesh.tensor.group)
                parameter.data -= 0.05 * parameter.grad
                parameter.grad = None
        export_model(model, spec, mesh, folder / f"{name}-merged")
        export_adapter(model, spec, LORA, mesh, folder / f"{name}-adapter")


def test_adapters(tmp_path):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    save_tiny(tmp_path / "in", VARIANT)
    run_ranks(_train, 2, tmp_path)
    tokens = torch.arange(40).unsqueeze(0)
    base = hf_logits(tmp_path / "in", tokens)
    assert torch.equal(hf_logits(tmp_path / "start", tokens), base)
    merged = hf_logits(tmp_path / "one-merged", tokens)
    assert (merged - base).abs().max() > 1e-2
    adapters = {
        name: load_file(tmp_path / f"{name}-adapter" / "adapter_model.safetensors")
        for name in ("one", "tp", "sp")
    }
    for name in ("tp", "sp"):
        assert adapters[name].keys() == adapters["one"].keys()
        for key, value in adapters["one"].items():
            np.testing.assert_allclose(
                adapters[name][key], value, rtol=2e-4, atol=2e-6, err_msg=f"{name} {key}"
            )
    folder = tmp_path / "one-adapter"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "in", config=AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(model, folder).eval()(tokens).logits
    assert (loaded - merged).abs().max() <= 1e-5
