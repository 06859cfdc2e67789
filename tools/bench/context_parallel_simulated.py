"""What the cost model says of schedules on clusters, and of the figures of arXiv 2510.18830."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np
from context_parallel_masks import make_index, slash_offsets

from ltrain.attention.cost_model import Setting, Shapes, needed_token_heads, predict
from ltrain.attention.profile import PROFILES, Profile
from ltrain.attention.work import Entries, Work, visible_entries
from ltrain.parallel.layout import SequenceLayout

SCHEDULES = ("ring", "all_gather", "ulysses", "needed", "hierarchical", "nested_ring", "ulysses_ring")


def simulate(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Predictions of all schedules for worlds x profiles x patterns, as rows."""
    rows = []
    for profile_name in options.profiles:
        profile = PROFILES[profile_name] if profile_name in PROFILES else Profile.load(profile_name)
        for pattern in options.patterns:
            index = make_index(pattern, options.tokens, options.block, options.kv_heads, options.density)
            shapes = Shapes(options.q_heads, options.kv_heads, options.head_dim, options.head_dim)
            for world in options.worlds:
                layout = SequenceLayout("striped", options.tokens, world, options.block)
                entries = visible_entries(index, layout, options.q_heads)
                for schedule in ("halo", *SCHEDULES) if pattern == "window" else SCHEDULES:
                    rows.append(_predicted(schedule, pattern, entries, layout, shapes, profile, options))
    return rows


def _predicted(
    schedule: str,
    pattern: str,
    entries: Entries,
    layout: SequenceLayout,
    shapes: Shapes,
    profile: Profile,
    options: argparse.Namespace,
) -> dict[str, Any]:
    if schedule in ("needed", "halo"):
        layout = SequenceLayout("zigzag", layout.num_tokens, layout.world_size, layout.block)
    work = Work.of(entries, layout, options.q_heads)
    needed = needed_token_heads(entries, layout, options.kv_heads) if schedule in ("needed", "halo") else None
    found = predict(schedule, Setting(work, shapes, profile, needed))
    return {
        "profile": profile.name,
        "pattern": pattern,
        "world": layout.world_size,
        **asdict(found),
        "imbalance": work.imbalance,
    }


def published() -> list[tuple[str, float, float]]:
    """(schedule, published ms, predicted ms) of a forward layer: Qwen2.5-3B heads, 512K, 4 x 8 A100, 95 %
    sparse."""
    tokens, ranks, block, select_ms = 524288, 32, 128, 1.13
    blocks = tokens // block
    offsets = slash_offsets(blocks, 16, 0.05, 0)
    rows = [np.concatenate([np.arange(o, blocks) for o in own]) for own in offsets]
    cols = [np.concatenate([np.arange(blocks - o) for o in own]) for own in offsets]
    heads = np.concatenate([np.full(len(r), h) for h, r in enumerate(rows)])
    layout = SequenceLayout("striped", tokens, ranks, block)
    work = Work.of(Entries(np.concatenate(rows), np.concatenate(cols), heads, 16, 1), layout, 16)
    setting = Setting(work, Shapes(16, 2, 128, 128), PROFILES["a100-40gb-hdr"])
    return [
        (name, ms, predict(name, setting).forward_s * 1e3 + select_ms)
        for name, ms in (("ring", 34.10), ("nested_ring", 19.53))
    ]
