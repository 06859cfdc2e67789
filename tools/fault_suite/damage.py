"""Damage done from outside, between two launches, to what a stopped job left on disk."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

from fault_suite.job import Job


def newest(job: Job) -> Path:
    return max(job.checkpoints.glob("step-*"), key=lambda path: path.name)


def _shard(job: Job) -> Path:
    return newest(job) / "rank-00001.safetensors"


def sign_again(folder: Path) -> None:
    """Make manifest and marker fit the files as they are now: a forgery, not an accident."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    text = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(text)
    (folder / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())


def cut_short(job: Job) -> None:
    os.truncate(_shard(job), _shard(job).stat().st_size // 2)


def flip_a_bit(job: Job) -> None:
    data = bytearray(_shard(job).read_bytes())
    data[len(data) * 2 // 3] ^= 4
    _shard(job).write_bytes(data)


def remove_a_file(job: Job) -> None:
    _shard(job).unlink()


def remove_the_marker(job: Job) -> None:
    (newest(job) / "COMPLETE").unlink()


def damage_all(job: Job) -> None:
    for shard in job.checkpoints.glob("step-*/rank-00000.safetensors"):
        os.truncate(shard, 100)


def forge_header(job: Job) -> None:
    """A tensor file whose header claims 2^62 bytes, with checksums that fit."""
    _shard(job).write_bytes((1 << 62).to_bytes(8, "little") + b"{}" + bytes(100))
    sign_again(newest(job))


def forge_shape(job: Job) -> None:
    """An index that claims a tensor of 2^50 elements, with checksums that fit."""
    index = newest(job) / "rank-00000.json"
    content = json.loads(index.read_text())
    entry = next(iter(content["pieces"].values()))
    entry.update(shape=[1 << 50], start=[0], box=[1 << 50])
    index.write_text(json.dumps(content))
    sign_again(newest(job))


def forge_state(job: Job) -> None:
    """A state without a step, with checksums that fit."""
    (newest(job) / "state.json").write_text(json.dumps({"step": "many", "loader": []}))
    sign_again(newest(job))


def link_outside(job: Job) -> None:
    outside = job.folder / "outside.safetensors"
    shutil.move(_shard(job), outside)
    _shard(job).symlink_to(outside)


def name_outside(job: Job) -> None:
    """A manifest that names a file above the folder."""
    path = newest(job) / "manifest.json"
    manifest: Any = json.loads(path.read_text())
    (job.checkpoints / "secret").write_text("x")
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    text = json.dumps(manifest).encode()
    path.write_bytes(text)
    (newest(job) / "COMPLETE").write_text(hashlib.sha256(text).hexdigest())


class _Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def plant_pickle(job: Job) -> None:
    """A pickle in place of the tensors, with checksums that fit; it creates `executed` when it is loaded."""
    _shard(job).write_bytes(pickle.dumps(_Bomb(str(job.folder / "executed"))))
    sign_again(newest(job))


def cut_metrics(job: Job) -> None:
    """Half a last line, as a killed process leaves it, and a block of zeros, as a crashed machine does."""
    with (job.run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "train/lo' + bytes(64))


def cut_data_cache(job: Job) -> None:
    for shard in (job.folder / "cache").rglob("tokens-*.bin"):
        os.truncate(shard, shard.stat().st_size // 2)


def leave_build_lock(job: Job) -> None:
    """The lock file of a process that was killed while it built the C++ kernel."""
    from torch.utils import cpp_extension

    from ltrain_kernels.block_sparse.cpu import _build_key

    name = f"ltrain_block_sparse_{_build_key()}"
    built = Path(cpp_extension._get_build_directory(name, verbose=False))
    copy = Path(job.environment["TORCH_EXTENSIONS_DIR"]) / name
    shutil.copytree(built, copy)
    (copy / "lock").touch()
