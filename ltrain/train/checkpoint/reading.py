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

# (start, box) to the stored runs of that box: place, file, name in the file.
Boxes = dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[Place, str, str]]]


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
    """The tensors of a verified checkpoint, by kind and global name, whatever layout wrote them.

    Raises CheckpointError where an index, the state or a tensor file is not what it must be, although its
    checksum fits. Never allocates more than the files hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state: dict[str, Any] = read_json(folder / "state.json")
        self._files: dict[str, Any] = {}
        self._places: dict[tuple[str, str], Boxes] = defaultdict(lambda: defaultdict(list))
        self.private: dict[int, dict[str, Any]] = {}
        self._check_state()
        for listing in sorted(folder.glob("rank-*.json")):
            index = read_json(listing)
            try:
                self.private[int(listing.stem.removeprefix("rank-"))] = dict(index["private"])
                entries = dict(index["pieces"])
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{listing.name}: is not an index: {error}") from None
            data = listing.with_suffix(".safetensors").name
            self._open(data)
            for key, entry in entries.items():
                kind, place = _place(entry, listing.name)
                self._places[kind, place.name][place.start, place.box].append((place, data, key))
        for (kind, name), boxes in self._places.items():
            self._check_whole(kind, name, boxes)

    def _open(self, data: str) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._files[data] = safe_open(self.folder / data, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder.name}: {data} cannot be opened: {error}") from None

    def _check_state(self) -> None:
        numbers = ("step", "tokens", "skipped_steps", "rollbacks", "optimizer_steps")
        try:
            wrong = [n for n in numbers if isinstance(self.state[n], bool) or int(self.state[n]) < 0]
            wrong += [name for name in ("loader", "layout") if not isinstance(self.state[name], dict)]
            if not isinstance(self.state["fingerprint"], str):
                wrong.append("fingerprint")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.folder.name}: state.json is not valid: {error}") from None
        if wrong:
            raise CheckpointError(f"{self.folder.name}: state.json holds no valid {', '.join(wrong)}")

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
        """A whole global tensor on the host. Raises CheckpointError on a missing tensor."""
        stored = self._places.get((kind, name))
        if not stored:
            raise CheckpointError(f"{self.folder.name} holds no {kind} of {name}")
        full: Tensor | None = None
        for (start, size), runs in stored.items():
            box = torch.cat([self._files[data].get_tensor(key).flatten() for _, data, key in runs])
            if full is None:
                full = torch.empty(runs[0][0].shape, dtype=box.dtype)
            full[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))] = box.view(size)
        assert full is not None
        return full

    def _check_whole(self, kind: str, name: str, boxes: Boxes) -> None:
        """Check, without reading a tensor, that the stored runs fill their boxes and the boxes the tensor."""
        where = f"{self.folder.name}: {kind} of {name}"
        shape = next(iter(boxes.values()))[0][0].shape
        for (_, size), runs in boxes.items():
            runs.sort(key=lambda entry: entry[0].first)
            end = 0
            for place, data, key in runs:
                if place.first != end or place.shape != shape:
                    raise CheckpointError(f"{where} has a gap, or runs that overlap")
                if self._count(data, key) != place.last - place.first:
                    raise CheckpointError(f"{where}: {key} in {data} is not of the size that the index says")
                end = place.last
            if end != math.prod(size):
                raise CheckpointError(f"{where} has a gap")
        if sum(math.prod(size) for _, size in boxes) != math.prod(shape) or _overlap(list(boxes)):
            raise CheckpointError(f"{where} has a gap, or boxes that overlap")

    def _count(self, data: str, key: str) -> int:
        """Number of elements that a file really holds of a tensor; -1 where it holds none of that name."""
        from safetensors import SafetensorError

        try:
            return math.prod(self._files[data].get_slice(key).get_shape())
        except (SafetensorError, KeyError):
            return -1

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


def _overlap(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether any two of the (start, size) boxes have an element in common."""
    return any(
        all(a < b + m and b < a + n for a, n, b, m in zip(start, size, other, extent, strict=True))
        for i, (start, size) in enumerate(boxes)
        for other, extent in boxes[:i]
    )
