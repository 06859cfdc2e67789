"""Profiles of a CPU run."""

import json

import torch

from ltrain.config.train import ProfileSection
from ltrain.train.profile import Profiler


def test_trace_and_memory_of_the_configured_steps_and_ranks(tmp_path):
    section = ProfileSection(steps=(2, 3), ranks=(0, 2), kinds=("trace", "memory"))
    assert Profiler.of(section, tmp_path, 1) is None
    assert Profiler.of(ProfileSection(), tmp_path, 0) is None
    profiler = Profiler.of(section, tmp_path / "profile", 2)
    assert profiler is not None
    for step in range(1, 5):
        profiler.before(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(1 << 20).add_(1)
        profiler.after(step)
    trace = json.loads((tmp_path / "profile" / "trace-rank2.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"step 2", "step 3"} <= names and not names & {"step 1", "step 4"}
    table = (tmp_path / "profile" / "memory-rank2.txt").read_text()
    assert "CPU Mem" in table and "aten::ones" in table
