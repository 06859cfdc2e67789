"""Keys and values of one layer of one sequence, in slots of a block each, a tensor for each group of heads.

Hkv key/value heads, Hg heads of a group, S slots, N blocks, T tokens, D head size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ltrain.generation.slots import SlotTable, Write


class LayerStore:
    """k and v, [Hg, S, block, D] for each group of the table. What a slot holds is said by the table."""

    def __init__(self) -> None:
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    def copy(self) -> LayerStore:
        made = LayerStore()
        made.k, made.v = [x.clone() for x in self.k], [x.clone() for x in self.v]
        return made

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (*self.k, *self.v))

    def load(self, table: SlotTable, k: Tensor, v: Tensor) -> None:
        """Take the blocks that `table.load` kept out of k, v [Hkv, T, D], the first tokens."""
        self.k, self.v = (
            [_pick(x, group, cols, table.block) for group, cols in _parts(table)] for x in (k, v)
        )

    def write(self, table: SlotTable, write: Write, k: Tensor, v: Tensor) -> None:
        """Put new tokens' k, v [Hkv, n, D] where `table.extend` said."""
        places = torch.from_numpy(write.places).to(k.device)
        for g, (group, cols) in enumerate(_parts(table)):
            heads = torch.arange(len(group), device=k.device)[:, None]
            slots = torch.from_numpy(write.slots[g]).to(k.device)
            for stored, x in ((self.k, k), (self.v, v)):
                missing = cols.shape[1] - stored[g].shape[1]
                if missing > 0:
                    old = stored[g]
                    stored[g] = torch.cat([old, old.new_zeros(len(group), missing, *old.shape[2:])], dim=1)
                stored[g][heads, slots, places] = x[torch.from_numpy(group).to(x.device)]

    def whole(self, table: SlotTable) -> tuple[Tensor, Tensor]:
        """Every key and value so far, [T, Hkv, D], of a table that keeps all blocks in order."""
        (k,), (v,) = self.k, self.v
        k, v = (x.flatten(1, 2)[:, : table.length].transpose(0, 1) for x in (k, v))
        return k, v


def _parts(table: SlotTable) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(table.groups, table.cols, strict=True))


def _pick(x: Tensor, group: np.ndarray, cols: np.ndarray, block: int) -> Tensor:
    missing = -x.shape[1] % block
    blocks = torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, block))
    heads = torch.from_numpy(group).to(x.device)[:, None]
    picked = blocks[heads, torch.from_numpy(cols.clip(min=0)).to(x.device)]
    # Slots without a block are zero: what is masked must still be a number.
    return picked * torch.from_numpy(cols >= 0).to(x.device)[..., None, None]
