"""Malformed model folders, data sources and checkpoints, each made in a folder of its own."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Damage = Callable[[Path], Any]


def data_cases() -> Iterator[tuple[str, dict[str, Any], Damage]]:
    """(name, source without its path, what is put into an empty folder) of sources that hold nothing usable,
    or that are told to refuse what is bad.
    """
    strict = {"on_bad_file": "refuse"}
    tree, lines, table = ({"kind": kind} for kind in ("text_tree", "jsonl", "parquet"))
    yield "tree-none", tree, lambda f: f.rmdir()
    yield "tree-empty", tree, lambda f: None
    yield "tree-only-empty-files", tree, lambda f: [(f / f"{i}.txt").touch() for i in range(3)]
    yield "tree-binary", tree, lambda f: (f / "a.txt").write_bytes(bytes(range(256)))
    yield "tree-latin1", tree | strict, lambda f: (f / "a.txt").write_bytes(b"caf\xe9")
    yield "tree-file", tree, lambda f: (f.rmdir(), f.write_text("text"))
    yield "tree-pipe", tree, lambda f: os.mkfifo(f / "pipe")
    yield "tree-loop", tree, lambda f: (f / "loop").symlink_to(f)
    yield "tree-dangling", tree, lambda f: (f / "a.txt").symlink_to(f / "none")
    yield "tree-bad-glob", {**tree, "glob": "/**"}, lambda f: (f / "a.txt").write_text("x")
    yield "jsonl-garbage", lines, lambda f: (f / "a.jsonl").write_text("{not json\n[1, 2\n")
    yield "jsonl-no-field", lines, lambda f: (f / "a.jsonl").write_text('{"txt": "a"}\n' * 3)
    yield "jsonl-numbers", lines, lambda f: (f / "a.jsonl").write_text('{"text": 5}\n"text"\n7\nnull\n')
    yield "jsonl-deep", lines, lambda f: (f / "a.jsonl").write_text("[" * 200_000)
    yield "jsonl-binary", lines, lambda f: (f / "a.jsonl").write_bytes(bytes(range(256)) * 9)
    yield "jsonl-surrogate", lines | strict, lambda f: (f / "a.jsonl").write_text('{"text": "\\ud800"}\n')
    yield "jsonl-pipe", lines, lambda f: os.mkfifo(f / "a.jsonl")
    yield "parquet-garbage", table, lambda f: (f / "a.parquet").write_bytes(b"PAR1" + bytes(90) + b"PAR1")
    yield "parquet-empty", table, lambda f: (f / "a.parquet").touch()
    yield "parquet-column", table, _other_column
    yield "parquet-cut", table, _cut_parquet


def _parquet(path: Path, column: str) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({column: ["some text"] * 50}), path)


def _other_column(folder: Path) -> None:
    _parquet(folder / "a.parquet", "body")


def _cut_parquet(folder: Path) -> None:
    _parquet(folder / "a.parquet", "text")
    os.truncate(folder / "a.parquet", 60)


def store_cases() -> Iterator[tuple[str, Damage]]:
    """(name, damage to a sound token store)."""

    def facts(**changes: Any) -> Damage:
        def change(folder: Path) -> None:
            path = folder / "facts.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return change

    def shard(**changes: Any) -> Damage:
        def change(folder: Path) -> None:
            path = folder / "facts.json"
            found = json.loads(path.read_text())
            found["shards"][0].update(changes)
            path.write_text(json.dumps(found))

        return change

    yield "no-facts", lambda f: (f / "facts.json").unlink()
    yield "facts-garbage", lambda f: (f / "facts.json").write_text("{")
    yield "facts-list", lambda f: (f / "facts.json").write_text("[]")
    yield "facts-binary", lambda f: (f / "facts.json").write_bytes(b"\xff\xfe\x00")
    yield "version", facts(version=99)
    yield "dtype", facts(dtype="float64")
    yield "tokenizer", facts(tokenizer="another")
    yield "vocabulary", facts(vocab_size="many")
    yield "shards", facts(shards=7)
    yield "shard-outside", shard(file="../../etc/passwd")
    yield "shard-tokens", shard(tokens=10**15)
    yield "shard-negative", shard(tokens=-5)
    yield "offsets-cut", lambda f: os.truncate(f / "offsets.npy", 100)
    yield "offsets-pickle", lambda f: np.save(f / "offsets.npy", np.array([{}], dtype=object))
    yield "offsets-other", lambda f: np.save(f / "offsets.npy", np.arange(61, dtype=np.int64))
    yield "tokens-cut", lambda f: os.truncate(f / "tokens-00000.bin", 101)
    yield "tokens-none", lambda f: (f / "tokens-00000.bin").unlink()
    yield "tokens-flipped", _flip(Path("tokens-00000.bin"))


def _flip(name: Path) -> Damage:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


def model_cases() -> Iterator[tuple[str, Damage]]:
    """(name, damage to a sound Hugging Face folder)."""

    def config(**changes: Any) -> Damage:
        def change(folder: Path) -> None:
            path = folder / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

        return change

    weights = "model.safetensors"
    yield "none", shutil.rmtree
    yield "no-config", lambda f: (f / "config.json").unlink()
    yield "config-garbage", lambda f: (f / "config.json").write_text("{")
    yield "config-list", lambda f: (f / "config.json").write_text("[]")
    yield "architecture", config(model_type="mamba", architectures=["MambaForCausalLM"])
    yield "heads", config(num_attention_heads=7)
    yield "heads-text", config(num_attention_heads="four")
    yield "layers", config(num_hidden_layers=9)
    yield "negative", config(hidden_size=-32)
    yield "rope", config(rope_parameters={"rope_type": "spiral"}, rope_scaling={"rope_type": "spiral"})
    yield "no-weights", lambda f: (f / weights).unlink()
    yield "weights-cut", lambda f: os.truncate(f / weights, 5000)
    yield "weights-header", lambda f: (f / weights).write_bytes((1 << 62).to_bytes(8, "little") + bytes(99))
    yield "weights-zeros", lambda f: (f / weights).write_bytes(bytes(1000))


def checkpoint_cases(seed: int = 0) -> Iterator[tuple[str, Damage]]:
    """(name, damage to a sound checkpoint); the forged ones get checksums that fit."""
    from fault_suite.damage import sign_again

    rng = random.Random(seed)
    yield "no-marker", lambda f: (f / "COMPLETE").write_text("")
    yield "no-manifest", lambda f: (f / "manifest.json").unlink()
    yield "manifest-list", lambda f: _signed_manifest(f, [])
    yield "manifest-format", lambda f: _signed_manifest(f, {"format": 99, "files": {}})
    yield "manifest-files", lambda f: _signed_manifest(f, {"format": 1, "files": [1]})
    yield "manifest-entries", lambda f: _signed_manifest(f, {"format": 1, "files": {"state.json": 5}})
    yield "manifest-none", lambda f: _signed_manifest(f, {"format": 1, "step": 2, "files": {}})
    yield "shard-cut", lambda f: os.truncate(f / "rank-00000.safetensors", 999)
    yield "shard-flipped", _flip(Path("rank-00000.safetensors"))
    for name in ("state.json", "rank-00000.json"):
        for i in range(10):
            yield f"forged-{name}-{i}", _forge(name, rng.randrange(1 << 30), sign_again)
        for i, text in enumerate(("", "{}", "[]", '{"step": NaN}', "[" * 100_000)):
            yield f"replaced-{name}-{i}", _replace(name, text.encode(), sign_again)
    yield "replaced-shard", _replace("rank-00000.safetensors", b"\x80\x04.", sign_again)


def _signed_manifest(folder: Path, manifest: Any) -> None:
    import hashlib

    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())


def _replace(name: str, data: bytes, sign: Damage) -> Damage:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)
        sign(folder)

    return change


def _forge(name: str, seed: int, sign: Damage) -> Damage:
    """Put something odd in place of a value at a random depth."""

    def change(folder: Path) -> None:
        rng = random.Random(seed)
        tree = json.loads((folder / name).read_text())
        node: Any = tree
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = rng.choice(keys)
            child = node[key]
            if not isinstance(child, dict | list) or not child or rng.random() < 0.3:
                break
            node = child
        node[key] = rng.choice([-1, 1 << 60, "odd", [], {}, None, 0.5, [1 << 50], True])
        (folder / name).write_text(json.dumps(tree))
        sign(folder)

    return change
