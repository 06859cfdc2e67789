"""All ways to cut the devices into groups of given kinds."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


class TooManyPartitionsError(Exception):
    """There are more partitions than the limit; the caller plans from the aggregated bound instead."""


@lru_cache(maxsize=64)
def all_partitions(use: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], limit: int) -> np.ndarray:
    """Every maximal partition: counts int64 [P, K] with sum_k counts[k] use[k] <= sizes and no room for
    another group.

    1,828 for 64 devices in powers of two. Raises TooManyPartitionsError beyond `limit`.
    """
    kinds = len(use)
    found: list[tuple[int, ...]] = []
    counts = [0] * kinds
    visited = 0

    def walk(k: int, free: tuple[int, ...]) -> None:
        nonlocal visited
        visited += 1
        if visited > 20 * limit:
            raise TooManyPartitionsError
        if k == kinds:
            if any(all(need <= room for need, room in zip(kind, free, strict=True)) for kind in use):
                return
            found.append(tuple(counts))
            if len(found) > limit:
                raise TooManyPartitionsError
            return
        most = min(room // need for need, room in zip(use[k], free, strict=True) if need)
        # The last kind takes all that is left: fewer would leave room for one more.
        for count in [most] if k == kinds - 1 else range(most, -1, -1):
            counts[k] = count
            walk(k + 1, tuple(room - count * need for need, room in zip(use[k], free, strict=True)))
        counts[k] = 0

    walk(0, sizes)
    return np.array(found, dtype=np.int64).reshape(len(found), kinds)
