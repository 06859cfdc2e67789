"""Halo: for sliding windows and local blocks only the keys just before a rank's own tokens move, from the
neighbour.

Point to point, no collective. Serves indices whose every block row reaches back at most as far as the
shortest run of consecutive blocks that a rank holds (the last run of the sequence, which none follows,
doesn't count), so that it asks for contiguous or zigzag layouts. With a window of w tokens a rank sends at
most 2 runs x w tokens of keys and values, whatever the length of the sequence. Bytes and memory: as `needed`.
"""

from __future__ import annotations

import numpy as np

from ltrain.attention.schedules.base import Problem
from ltrain.attention.schedules.needed import NeededBlocks, needed_blocks
from ltrain.config.base import ConfigError


def halo_blocks(problem: Problem) -> NeededBlocks:
    """`needed_blocks`, checked to lie just before each rank's own runs. Raises ConfigError where they
    don't."""
    needed = needed_blocks(problem)
    owner = problem.layout.block_owner
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    lengths = np.diff(np.append(starts, len(owner)))
    shortest = int(lengths[:-1].min()) if len(lengths) > 1 else len(owner)
    reach = 0
    for rank in range(problem.layout.world_size):
        blocks = np.flatnonzero(needed.of(rank).any(0))
        own = starts[owner[starts] == rank]
        if len(blocks):
            following = np.searchsorted(own, blocks)
            # Causality puts every needed block before one of the rank's runs.
            reach = max(reach, int((own[np.minimum(following, len(own) - 1)] - blocks).max()))
    if reach > shortest:
        raise ConfigError(
            "schedule",
            "halo",
            f"needs a reach of at most {shortest} blocks, the shortest run of a rank; these reach {reach}",
            "use a contiguous layout, a smaller window, or schedule 'needed'",
        )
    return needed
