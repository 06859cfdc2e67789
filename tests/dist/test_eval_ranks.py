"""An evaluation gives the same figures on one process and on two and four ranks."""

import os
from pathlib import Path

import numpy as np
import pytest
from support.distributed import run_ranks
from support.learned_recomputation import save_learned
from support.models import save_tiny

from ltrain.data.tokenizer import byte_tokenizer
from ltrain.eval.run import EvalSettings, run_eval

PATTERNS = {
    "dense": "dense",
    "s2": "{kind: s2, local_blocks: 1, stride: 2}",
    "longgen": "{kind: longgen, full_layers: [1], sparse: {kind: sliding_window, window: 40, sinks: 4}}",
    "vertical_slash": "{kind: vertical_slash, observed: 16, window: 16, sinks: 2, dense_below: 0, "
    "vertical_p: 0.3, slash_p: 0.3, max_verticals: 4, max_slashes: 2, verticals: tokens}",
    "block_topk": "{kind: block_topk, top_k: 3}",
    "seer_gate": "trained",
    "nsa": "trained",
}
LEARNED = {
    "seer_gate": {"kind": "seer_gate", "top_k": 3, "gate_dim": 8},
    "nsa": {"kind": "nsa", "top_k": 3, "compress": 8, "window": 40, "initial_gates": [0.5, 0.75, 0.25]},
}


def _evaluate(rank, world_size, root):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    root = Path(root)
    found = {}
    for name, attention in PATTERNS.items():
        if name in LEARNED and world_size == 4:
            continue  # two ranks are enough
        settings = EvalSettings(
            samples=3,
            text=root / "text",
            holdout=0.0,
            cache=root / "cache",
            device="cpu",
            attention=attention,
            block=32,
        )
        tasks = ["perplexity", "kv_turns"] if name in ("dense", "s2") else ["perplexity"]
        lengths = [1024] if name in ("dense", "s2") else [256, 500]
        out = root / f"out-{world_size}-{name}"
        results = run_eval(root / (name if name in LEARNED else "model"), tasks, lengths, out, settings)
        lines = (out / "samples.jsonl").read_text().splitlines() if rank == 0 else []
        found[name] = results, len(lines)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("eval")
    save_tiny(made / "model", "qwen3", vocab_size=258, max_position_embeddings=1024)
    byte_tokenizer().save(made / "model")
    for name, pattern in LEARNED.items():
        save_learned(made / "model", made / name, pattern, 32)
    (made / "text").mkdir()
    # From a text that is shorter than one block a rank to one of several windows.
    for i, count in enumerate((1, 12, 61)):
        (made / "text" / f"{i}.txt").write_text(f"document {i} says little. " * count)
    return made


@pytest.fixture(scope="module")
def alone(root):
    try:
        return _evaluate(0, 1, str(root))
    finally:
        for name in ("RANK", "WORLD_SIZE"):
            del os.environ[name]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_find_what_one_process_finds(root, alone, world_size):
    outcomes = run_ranks(_evaluate, world_size, str(root))
    for name in outcomes[0]:
        expected, lines = alone[name]
        results = [outcome[name][0] for outcome in outcomes]
        assert all(found == results[0] for found in results), "every rank has all results"
        assert outcomes[0][name][1] == lines
        assert results[0].get("tasks") == expected.get("tasks")
        for have, want in zip(results[0]["perplexity"], expected["perplexity"], strict=True):
            assert have["targets"] == want["targets"] and have["documents"] == 3
            np.testing.assert_allclose(have["loss"], want["loss"], rtol=2e-6, err_msg=name)
            for field in ("by_position", "by_document_length"):
                assert have[f"targets_{field}"] == want[f"targets_{field}"]
                np.testing.assert_allclose(
                    list(have[field].values()), list(want[field].values()), rtol=5e-6, err_msg=name
                )
    losses = {name: found["perplexity"][0]["loss"] for name, (found, _) in alone.items()}
    assert len({round(loss, 4) for loss in losses.values()}) == len(losses), "patterns must matter"
