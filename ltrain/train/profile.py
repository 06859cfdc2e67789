"""Traces and memory of a few steps, for one to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ltrain.config.train import ProfileSection


class Profiler:
    """Records the steps from `first` to `last` on this rank, and writes into `folder`.

    `trace` is a Chrome trace, `trace-rankN.json`. `memory` is the allocator's history on CUDA,
    `memory-rankN.pickle` for pytorch.org/memory_viz; on the CPU, whose allocator keeps none, the bytes that
    each operation allocated and freed, `memory-rankN.txt`.
    """

    def __init__(self, section: ProfileSection, folder: Path, rank: int) -> None:
        assert section.steps is not None
        self.first, self.last = section.steps
        self.kinds, self.folder, self.rank = section.kinds, folder, rank
        self._history = "memory" in self.kinds and torch.cuda.is_available()
        self._profile: Any = None

    @classmethod
    def of(cls, section: ProfileSection, folder: Path, rank: int) -> Profiler | None:
        """The profiler of this rank, if it has one."""
        return cls(section, folder, rank) if section.steps is not None and rank in section.ranks else None

    def before(self, step: int) -> None:
        if step != self.first:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if "trace" in self.kinds or not self._history:
            self._profile = torch.profiler.profile(profile_memory=True, record_shapes=True)
            self._profile.start()
        if self._history:
            torch.cuda.memory._record_memory_history()

    def after(self, step: int) -> None:
        if step != self.last:
            return
        if self._profile is not None:
            self._profile.stop()
            if "trace" in self.kinds:
                self._profile.export_chrome_trace(str(self.folder / f"trace-rank{self.rank}.json"))
            if "memory" in self.kinds and not self._history:
                table = self._profile.key_averages().table(sort_by="self_cpu_memory_usage", row_limit=100)
                (self.folder / f"memory-rank{self.rank}.txt").write_text(table)
            self._profile = None
        if self._history:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-rank{self.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
