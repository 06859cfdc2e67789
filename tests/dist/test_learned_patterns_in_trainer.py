"""Patterns with weights of their own: trained alike on any layout, resumed bitwise, exported beside the
model."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from support.distributed import run_ranks
from support.tiny import build, parameter_hash, tiny_tree, write_text

PATTERNS = {
    "seer_gate": {
        **{"kind": "seer_gate", "top_k": 3, "gate_dim": 8, "target_rows": 3},
        "dense_layers": [0],
    },
    "nsa": {
        **{"kind": "nsa", "top_k": 3, "compress": 8, "window": 24, "local_blocks": 1},
        "initial_gates": [0.5, 0.75, 0.25],
    },
}


def _tree(folder, kind, name, **overrides):
    tree = tiny_tree(
        folder,
        run__name=f"{kind}-{name}",
        attention={"pattern": PATTERNS[kind]},
        parallel__context={"degree": 1, "schedule": "ring", "block": 16},
        train__steps=2,
    )
    for section, fields in overrides.items():
        tree[section] = {**tree.get(section, {}), **fields}
    return tree


def _train(tree, steps, save=False):
    from ltrain.train.main import restore
    from ltrain.train.trainer import Trainer

    run = build(tree)
    restore(run.config, run)
    trainer = Trainer(run.config, run)
    while run.step < steps:
        trainer.one_step()
    if save:
        trainer.save(wait=True)
    trainer.measure.close()
    return run


def _whole(run):
    """Pattern weights of all heads, by name."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region as gather

    found = {}
    for name, parameter in run.model.named_parameters():
        if ".core_attention.learned." in name:
            shard = parameter.detach()
            found[name] = (shard if run.mesh.tensor.size == 1 else gather(shard.T.contiguous()).T).numpy()
    return found


def _on_one(rank, world_size, folder):
    from ltrain.train.main import export_run

    outcome = {}
    for kind in PATTERNS:
        run = _train(_tree(Path(folder), kind, "one"), 2)
        export_run(run, Path(folder) / f"{kind}-hf")
        fresh = build(_tree(Path(folder), kind, "fresh"))
        again = _tree(Path(folder), kind, "again")
        again["model"] = {"kind": "hf", "path": str(Path(folder) / f"{kind}-hf")}
        outcome[kind] = (_whole(run), _whole(fresh), parameter_hash(run.model), parameter_hash(build(again).model))
    return outcome


def _on_two(rank, world_size, folder):
    outcome = {}
    for kind in PATTERNS:
        tensor = _train(
            _tree(
                Path(folder),
                kind,
                "tensor",
                parallel={"tensor": 2},
                optimizer={"distributed": False},
                memory={"level": "full"},
            ),
            2,
        )
        weights = _whole(tensor)
        # A memory level is one more layout that the weights must not depend on.
        cut = {"parallel": {"context": {"degree": 2, "schedule": "ring", "block": 16}}}
        cut["memory"] = {"level": "mlp"}
        whole = _train(_tree(Path(folder), kind, "whole", **cut), 2)
        _train(_tree(Path(folder), kind, "broken", **cut), 1, save=True)
        resumed = _train(_tree(Path(folder), kind, "broken", **cut), 2)
        assert resumed.step == 2
        outcome[kind] = weights, _whole(whole), parameter_hash(whole.model), parameter_hash(resumed.model)
    return outcome


def test_weights_of_patterns_are_trained_saved_and_exported(tmp_path):
    from transformers import AutoModelForCausalLM

    write_text(tmp_path / "text")
    one = run_ranks(_on_one, 1, str(tmp_path))[0]
    two = run_ranks(_on_two, 2, str(tmp_path))[0]
    for kind in PATTERNS:
        trained, fresh, exported, imported = one[kind]
        assert trained.keys() == fresh.keys() and len(trained) == (2 if kind == "seer_gate" else 6)
        for name, values in trained.items():
            assert np.abs(values - fresh[name]).max() > 1e-3, f"{kind} {name} was not trained"
        tensor, context, whole, resumed = two[kind]
        for name in trained:
            np.testing.assert_allclose(tensor[name], trained[name], rtol=2e-3, atol=2e-4, err_msg=name)
            np.testing.assert_allclose(context[name], trained[name], rtol=2e-3, atol=2e-4, err_msg=name)
        assert resumed == whole, f"{kind} does not resume bitwise"
        assert imported == exported, f"{kind} is not what was exported"

        folder = tmp_path / f"{kind}-hf"
        facts = json.loads((folder / "attention_pattern.json").read_text())
        assert facts["pattern"]["kind"] == kind and facts["block"] == 16
        stored = load_file(folder / facts["weights"])
        by_layer = {name.replace("self_attention.core_attention.learned", ""): x for name, x in trained.items()}
        assert len(stored) == len(by_layer)
        for name, tensor in stored.items():
            layer, part = name.split(".")[2], name.split(".")[-1]
            values = trained[f"decoder.layers.{layer}.self_attention.core_attention.learned.{part}"]
            assert torch.equal(tensor, torch.from_numpy(np.ascontiguousarray(values))), name
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert torch.isfinite(model(torch.arange(20)[None]).logits).all()
