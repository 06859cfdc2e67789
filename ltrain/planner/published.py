"""The published measurements that the simulator is held against (arXiv 2412.01523): constants, cells, step
seconds.

8 nodes of 8 A100-40GB, NVLink, one 400 Gb/s link per node; batches of 512 documents, longer ones dropped.
Cost constants are those of the released code; seconds are read off the paper's bar chart, and agree with its
printed ratios to 0.05.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ltrain.planner.cluster import ClusterSpec
from ltrain.planner.cost import CostModel

ALL_TO_ALL_GB_S = {2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}
NUM_DEVICES, DEVICES_PER_NODE, BATCH = 64, 8, 512
_DEVICE_MIB = 30 * 1024
_LENGTH_MULTIPLE = 128


@dataclass(frozen=True)
class Model:
    """Constants of one model: seconds, MiB of activations per token, 2^30 parameters at 384K positions."""

    name: str
    attention_s: float
    linear_s: float
    fixed_s: float
    token_mib: float
    layers: int
    hidden: int
    params: float

    def cost(self) -> CostModel:
        """Ulysses only, as in the paper."""
        return CostModel(
            self.attention_s,
            self.linear_s,
            self.fixed_s,
            16.0 * self.layers * self.hidden,
            num_heads=64,
            schedules=("ulysses",),
        )

    def tokens_per_device(self, max_length: int) -> int:
        """What 30 GiB leave for activations beside ZeRO-3 states; learned positions shrink with the
        context."""
        params = self.params - (393_216 - max_length) * self.hidden / 2**30
        return int((_DEVICE_MIB - params * 16 * 1024 / NUM_DEVICES) / self.token_mib)


MODELS = {
    model.name: model
    for model in (
        Model("7B", 5.128e-9, 0.1839576e-3, 0.6293563, 4.4804, 32, 4096, 7.85),
        Model("13B", 9.2852e-9, 0.3060189e-3, 1.1325632, 4.2204, 40, 5120, 14.03),
        Model("30B", 15.4262e-9, 0.8035742e-3, 2.7893644, 3.4174, 60, 6656, 32.72),
    )
}


@dataclass(frozen=True)
class Cell:
    """One bar group: measured seconds per step of static Ulysses, of one degree per batch, and of the planned
    groups."""

    model: str
    max_length: int
    mix: str
    static_s: float
    adaptive_s: float
    planned_s: float


def _cells() -> tuple[Cell, ...]:
    k192, k384 = 196_608, 393_216
    rows: Mapping[tuple[str, int], tuple[tuple[float, float, float], ...]] = {
        ("7B", k192): ((28.5, 26.5, 19.7), (24.0, 22.0, 16.0), (8.0, 5.9, 4.8)),
        ("7B", k384): ((32.1, 31.1, 25.4), (26.7, 25.5, 18.8), (8.2, 6.1, 5.6)),
        ("13B", k192): ((47.8, 44.2, 34.2), (40.0, 37.4, 29.6), (13.9, 10.6, 8.7)),
        ("13B", k384): ((53.9, 50.7, 41.6), (52.6, 49.8, 38.3), (14.7, 12.1, 10.4)),
        ("30B", k192): ((120, 114, 83), (110, 101, 71), (29.0, 23.8, 17.6)),
        ("30B", k384): ((133, 130, 109), (116, 111, 88), (32.4, 27.6, 21.0)),
    }
    mixes = ("github", "commoncrawl", "wikipedia")
    return tuple(
        Cell(model, cap, name, *seconds)
        for (model, cap), group in rows.items()
        for name, seconds in zip(mixes, group, strict=True)
    )


CELLS = _cells()


def cluster(model: Model, max_length: int, inter_factor: float = 1.0) -> ClusterSpec:
    """The paper's cluster; `inter_factor` multiplies the rates between nodes (8: one 400 Gb/s link per
    device)."""
    rates = {d: r * (inter_factor if d > DEVICES_PER_NODE else 1.0) for d, r in ALL_TO_ALL_GB_S.items()}
    return ClusterSpec.uniform(
        NUM_DEVICES,
        DEVICES_PER_NODE,
        ALL_TO_ALL_GB_S[8],
        6.25 * inter_factor,
        model.tokens_per_device(max_length),
        all_to_all_gb_s=rates,
    )


def padded(lengths: list[int]) -> list[int]:
    """Lengths rounded up as the released code does, to multiples of 128."""
    return [-(-length // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE for length in lengths]
