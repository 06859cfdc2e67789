"""Every configuration that we ship passes `ltrain check`, at full size and without the weights' bytes."""

import json
import struct
from pathlib import Path

import pytest
import yaml

from ltrain.cli import main
from ltrain.config.load import load_config
from ltrain.model.families import read_spec
from ltrain.model.sharding import hf_shapes

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = {
    "llama3.1_8b_64k": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen2.5_3b_512k": {
        "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    },
}  # fmt: skip
PUBLISHED["llama3.1_8b_128k_s2"] = PUBLISHED["llama3.1_8b_64k"]
SMALL = {
    "model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 258, "max_position_embeddings": 512,
    "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
WORLD = {"llama3.1_8b_64k": 8, "qwen2.5_3b_512k": 32, "planned_cpu": 4}


def _sparse_model(folder: Path, config: dict) -> Path:
    """A Hugging Face folder whose safetensors file has a true header and a hole instead of weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in hf_shapes(read_spec(folder)).items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + at)
    return folder


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_a_shipped_config_passes_check(path, tmp_path, capsys):
    assert len(path.read_text().splitlines()) < 60
    tree = yaml.safe_load(path.read_text())
    overrides = ["--data.tokenizer", "byte"]
    if tree["model"]["kind"] == "hf":
        folder = _sparse_model(tmp_path / "model", PUBLISHED.get(path.stem, SMALL))
        overrides += ["--model.path", str(folder)]
    # Corpora are not shipped either: `check` reads a small one in their place.
    load_config(path)
    if any(source.get("path") != "stdlib" for source in tree["data"]["sources"]):
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "one.txt").write_text("a document " * 40)
        overrides += ["--data.sources", f"[{{kind: text_tree, path: {tmp_path / 'text'}}}]"]
        overrides += ["--data.cache", str(tmp_path / "cache")]
    degrees = tree.get("parallel", {})
    world = (
        degrees.get("context", {}).get("degree", 1) * degrees.get("tensor", 1) * degrees.get("pipeline", 1)
    )
    world = WORLD.get(path.stem, world)
    assert main(["check", str(path), "--world-size", str(world), *overrides]) == 0
    said = capsys.readouterr().out
    assert "memory a rank" in said and f"= {world} ranks" in " ".join(said.split())


def test_the_long_configs_are_what_they_are_named_for():
    from ltrain.attention import patterns

    ring = load_config(CONFIGS / "qwen2.5_3b_512k.yaml")
    assert ring.attention.pattern.kind == "vertical_slash"
    assert (ring.parallel.context.schedule, ring.parallel.context.node_size) == ("nested_ring", 8)
    s2 = load_config(CONFIGS / "llama3.1_8b_128k_s2.yaml")
    assert s2.parallel.context.schedule == "needed"
    blocks = s2.train.seq_len // s2.parallel.context.block
    # Two tensor-parallel ranks of four heads each, by global head id: together they see every block.
    seen = set()
    for first in (0, 4):
        index = patterns.from_config(s2.attention.pattern).index(
            num_tokens=s2.train.seq_len, num_kv_heads=4, num_heads=16, block=64, layer=2, num_layers=32,
            kv_head_offset=first, total_kv_heads=8,
        )  # fmt: skip
        ptr, col = index.select([blocks - 1], list(range(blocks))).entries()
        seen |= set(col[: int(ptr.max())].tolist())
    assert seen == set(range(blocks))


def test_the_world_size_must_fit(capsys):
    assert main(["check", str(CONFIGS / "quickstart_base.yaml"), "--world-size", "3"]) == 2
    assert "train.tokens_per_step=4096 must be a multiple" in capsys.readouterr().err


def test_field_list_is_what_the_documentation_says():
    from ltrain.config.document import configuration_page

    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert page.read_text() == configuration_page(), (
        "run: python -m ltrain.config.document > docs/configuration.md"
    )


def test_a_resolved_config_loads_again(tmp_path):
    from ltrain.train.plan import write_config

    config = load_config(CONFIGS / "quickstart_base.yaml")
    write_config(config, tmp_path)
    assert load_config(tmp_path / "config.yaml") == config


def test_combinations_page_is_current():
    from ltrain.config.combinations import combinations_page

    page = CONFIGS.parent / "docs" / "combinations.md"
    assert page.read_text() == combinations_page(), (
        "run: python -m ltrain.config.combinations > docs/combinations.md"
    )
