"""A checkpoint folder: it exists whole or not at all, and nothing in it is executed when it is read.

    step-00000100/
      rank-00000.safetensors   this rank's tensors
      rank-00000.json          what they are
      state.json               step, data position, counters, world layout
      manifest.json            size and SHA-256 of every file above
      COMPLETE                 SHA-256 of the manifest

Files are written to a hidden folder, flushed to disk and then renamed into place in one step. Reading checks
names, sizes and sums before a byte is parsed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from torch import Tensor

FORMAT_VERSION = 1
_NAME = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")
_STEP = re.compile(r"^step-(\d{8,})$")
MAX_JSON_BYTES = 256 << 20


class CheckpointError(Exception):
    """A checkpoint cannot be used: the text says which, why, and what to do."""


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def list_steps(root: Path) -> list[int]:
    """Steps whose folder bears the COMPLETE marker, newest first; nothing is verified yet."""
    if not root.is_dir():
        return []
    found = [_STEP.match(entry.name) for entry in root.iterdir() if (entry / "COMPLETE").is_file()]
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file and flush it to disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value, allow_nan=False).encode())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def new_temporary(root: Path, step: int) -> Path:
    """Create the hidden folder that a checkpoint is written to."""
    folder = root / f".tmp-{step:08d}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    return folder


def write_rank(folder: Path, rank: int, tensors: dict[str, Tensor], index: Any) -> dict[str, Any]:
    """Write one rank's tensors and index; return their manifest entries."""
    from safetensors.torch import save_file

    entries = {}
    data, listing = folder / f"rank-{rank:05d}.safetensors", folder / f"rank-{rank:05d}.json"
    save_file(tensors, data)
    with data.open("rb") as file:
        os.fsync(file.fileno())
    write_json(listing, index)
    for path in (data, listing):
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return entries


def commit(folder: Path, root: Path, step: int, entries: dict[str, Any], state: Any) -> Path:
    """Complete a temporary folder with state, manifest and marker, and rename it into place."""
    write_json(folder / "state.json", state)
    path = folder / "state.json"
    entries = {**entries, path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}}
    manifest = json.dumps({"format": FORMAT_VERSION, "step": step, "files": entries}).encode()
    write_bytes(folder / "manifest.json", manifest)
    write_bytes(folder / "COMPLETE", hashlib.sha256(manifest).hexdigest().encode())
    sync_folder(folder)
    target = step_folder(root, step)
    if target.exists():  # the same step again, after a rollback: the old one goes by rename first
        remove(target)
    folder.rename(target)
    sync_folder(root)
    return target


def remove(folder: Path) -> None:
    """Delete a checkpoint: renamed first, so that a half-deleted one is never taken for a whole one."""
    if not folder.exists():
        return
    hidden = folder.with_name(f".trash-{uuid.uuid4().hex[:8]}")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(root: Path) -> None:
    """Delete what killed processes left behind."""
    for entry in root.glob(".t*-*") if root.is_dir() else ():
        if entry.name.startswith((".tmp-", ".trash-")):
            shutil.rmtree(entry, ignore_errors=True)


def quarantine(folder: Path) -> Path:
    """Set a damaged checkpoint aside, so that it is neither used nor lost."""
    target = folder.with_name(f"damaged-{folder.name}-{uuid.uuid4().hex[:4]}")
    folder.rename(target)
    return target


def read_json(path: Path) -> Any:
    """Parse a JSON file of bounded size without NaN. Raises CheckpointError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")

        def refuse(constant: str) -> None:
            raise ValueError(f"holds {constant}")

        return json.loads(path.read_bytes(), parse_constant=refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from None


def verify(folder: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Check a checkpoint and return its manifest; with `parts`, hash only every parts-th file from `part`.

    Raises CheckpointError on a missing marker, a wrong sum or size, a missing file, or a name that leaves the
    folder.
    """
    marker, manifest_path = folder / "COMPLETE", folder / "manifest.json"
    if folder.is_symlink() or not marker.is_file():
        raise CheckpointError(f"{folder.name} has no COMPLETE marker: it was not written to its end")
    if not manifest_path.is_file() or sha256(manifest_path) != marker.read_text().strip()[:64]:
        raise CheckpointError(f"{folder.name}: manifest.json does not match its checksum")
    manifest = read_json(manifest_path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{folder.name}: format {manifest.get('format')} is not {FORMAT_VERSION}")
    unnamed = {path.name for path in folder.iterdir()} - {"manifest.json", "COMPLETE", *manifest["files"]}
    if unnamed or "state.json" not in manifest["files"]:
        what = ", ".join(sorted(unnamed)) or "state.json"
        raise CheckpointError(f"{folder.name}: manifest.json does not name {what}")
    for i, (name, entry) in enumerate(sorted(manifest["files"].items())):
        path = folder / name
        if not _NAME.match(name) or path.is_symlink():
            raise CheckpointError(f"{folder.name}: {name!r} is not a plain file name")
        if not path.is_file():
            raise CheckpointError(f"{folder.name}: {name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{folder.name}: {name} has {path.stat().st_size} bytes and must have {entry['bytes']}"
            )
        if i % parts == part and sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{folder.name}: {name} does not match its checksum")
    return manifest
