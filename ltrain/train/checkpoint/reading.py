"""Reading pieces back into any layout."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltrain.train.checkpoint.folder import CheckpointError, read_json
from ltrain.train.checkpoint.pieces import Piece, Place


def index_entry(piece: Piece) -> dict[str, Any]:
    return {"kind": piece.kind, **asdict(piece.place)}


def _place(entry: Any, source: str) -> tuple[str, Place]:
    """A checked index entry. Raises CheckpointError where sizes contradict one another."""
    try:
        lists = [tuple(int(n) for n in entry[key]) for key in ("shape", "start", "box")]
        place = Place(str(entry["name"]), *lists, int(entry["first"]), int(entry["last"]))
        whole = all(
            s >= 0 and b > 0 and s + b <= n
            for n, s, b in zip(place.shape, place.start, place.box, strict=True)
        )
        if not whole or not 0 <= place.first <= place.last <= math.prod(place.box):
            raise ValueError("its box or run leaves the tensor")
        return str(entry["kind"]), place
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: an index entry is not valid: {error}") from None


class CheckpointReader:
    """The tensors of a verified checkpoint, by kind and global name, whatever layout wrote them."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self.state: dict[str, Any] = read_json(folder / "state.json")
        self._files: dict[str, Any] = {}
        self._places: dict[tuple[str, str], list[tuple[Place, str, str]]] = defaultdict(list)
        self.private: dict[int, dict[str, Any]] = {}
        for listing in sorted(folder.glob("rank-*.json")):
            data = listing.with_suffix(".safetensors").name
            index = read_json(listing)
            self.private[int(listing.stem.removeprefix("rank-"))] = index["private"]
            self._files[data] = safe_open(folder / data, framework="pt")
            for key, entry in index["pieces"].items():
                kind, place = _place(entry, listing.name)
                self._places[kind, place.name].append((place, data, key))

    def names(self, kind: str) -> list[str]:
        return sorted(name for k, name in self._places if k == kind)

    def __contains__(self, key: tuple[str, str]) -> bool:
        return key in self._places

    def private_tensors(self, rank: int, prefix: str) -> dict[str, Tensor]:
        """Tensors that only make sense on the same layout: random states, synchronisation buffers."""
        file = self._files[f"rank-{rank:05d}.safetensors"]
        start = f"private/{prefix}"
        keys = [key for key in list(file.keys()) if key.startswith(start)]
        return {key.removeprefix(start): file.get_tensor(key) for key in keys}

    def whole(self, kind: str, name: str) -> Tensor:
        """A whole global tensor on the host. Raises CheckpointError on a gap or a missing tensor."""
        stored = self._places.get((kind, name))
        if not stored:
            raise CheckpointError(f"{self.folder.name} holds no {kind} of {name}")
        shape = stored[0][0].shape
        boxes: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}
        filled: dict[Any, int] = defaultdict(int)
        for place, data, key in stored:
            run = self._files[data].get_tensor(key).flatten()
            if place.shape != shape or run.numel() != place.last - place.first:
                raise CheckpointError(f"{self.folder.name}: the pieces of {kind} {name} do not fit together")
            at = (place.start, place.box)
            if at not in boxes:
                boxes[at] = torch.empty(math.prod(place.box), dtype=run.dtype)
            boxes[at][place.first : place.last] = run
            filled[at] += run.numel()
        full = torch.empty(shape, dtype=next(iter(boxes.values())).dtype)
        covered = 0
        for at, box in boxes.items():
            if filled[at] != box.numel():
                raise CheckpointError(f"{self.folder.name}: {kind} of {name} has a gap")
            start, size = at
            full[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))] = box.view(size)
            covered += box.numel()
        if covered != full.numel():
            raise CheckpointError(f"{self.folder.name}: {kind} of {name} has a gap")
        return full

    @torch.no_grad()
    def fill(self, piece: Piece, whole: Tensor) -> None:
        """Copy this rank's run out of the whole tensor. The padding of a vocabulary may differ between
        layouts.
        """
        place = piece.place
        if whole.shape != place.shape:
            if whole.dim() != len(place.shape) or whole.shape[1:] != place.shape[1:]:
                stored = tuple(whole.shape)
                raise CheckpointError(
                    f"{place.name} is {stored} in the checkpoint, {place.shape} in the model"
                )
            padded = whole.new_zeros(place.shape)
            rows = min(whole.shape[0], place.shape[0])
            padded[:rows] = whole[:rows]
            whole = padded
        box = whole[tuple(slice(s, s + n) for s, n in zip(place.start, place.box, strict=True))]
        run = box.reshape(-1)[place.first : place.last]
        piece.tensor.copy_(run.view(piece.tensor.shape))


def restore_pieces(reader: CheckpointReader, pieces: list[Piece], *, fresh_optimizer: bool = False) -> None:
    """Fill all pieces of this rank. Main copies that were not stored come from the parameters."""
    cache: tuple[Any, Tensor] | None = None
    order = {id(piece): i for i, piece in enumerate(pieces)}
    for piece in sorted(pieces, key=lambda p: (p.kind, p.place.name, order[id(p)])):
        kind, name = piece.kind, piece.place.name
        if fresh_optimizer and kind.startswith("exp_"):
            continue
        if kind == "main" and (kind, name) not in reader:
            kind = "param"
        if kind == "param" and ("main", name) in reader and piece.tensor.dtype == torch.float32:
            kind = "main"  # a bf16 run continued in fp32 keeps its full precision
        if cache is None or cache[0] != (kind, name):
            cache = ((kind, name), reader.whole(kind, name))
        reader.fill(piece, cache[1])
