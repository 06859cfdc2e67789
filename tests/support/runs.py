"""Run folders as training writes them, from closed formulas: what a report is made of, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

TOKENS_PER_STEP = 16384
BUCKETS = (128, 256, 512, 1024, 2048, 4096)


def write_run(
    folder: Path, *, steps: int = 40, seed: int = 0, extras: bool = False, base_context: int = 512
) -> Path:
    """A run of `steps` steps that extends a model of `base_context` tokens to 4096.

    `extras` adds the metrics of sparse attention, elimination, planning, the exchange, sync and a GPU.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_text(json.dumps({"max_position_embeddings": base_context}))
    config = {
        "run": {"name": folder.name, "seed": seed},
        "model": {"kind": "hf", "path": str(base)},
        "rope": {"kind": "yarn", "factor": 8},
        "train": {"seq_len": 4096, "tokens_per_step": TOKENS_PER_STEP, "steps": steps, "dtype": "fp32"},
        "parallel": {"tensor": 1, "pipeline": 1, "context": {"degree": 2}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    now = 1_700_000_000.0
    lines: list[dict[str, Any]] = [{"schema": 1}, {"step": 0, "time": now, **held_out(2.0, 0.9)}]
    for step in range(1, steps + 1):
        seconds = 5.0 * (2.0 if step == 1 else 1.0) * float(rng.normal(1, 0.03))
        now += seconds
        loss = 1.55 + 1.1 * math.exp(-step / (0.2 * steps)) + float(rng.normal(0, 0.03))
        record = {"step": step, "time": round(now, 3), **_training(step, steps, seconds, loss, rng)}
        lines.append(record | (_extras(step, steps, seconds, rng) if extras else {}))
    lines.append({"step": steps, "time": round(now + 1, 3), **held_out(1.97, -0.15)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def held_out(level: float, slope: float) -> dict[str, float]:
    """An evaluation whose loss changes by `slope` per bucket beyond position 512."""
    by_position = {
        f"eval/loss_pos/{end}": level - 0.1 * i + (slope + 0.1) * max(0, i - 2)
        for i, end in enumerate(BUCKETS)
    }
    loss = sum(by_position.values()) / len(by_position)
    return {"eval/loss": loss, "eval/ppl": math.exp(loss), **by_position}


def _training(step: int, steps: int, seconds: float, loss: float, rng: Any) -> dict[str, float]:
    return {
        "mem/host_gib": 1.4 + 0.001 * step,
        "mem/max_allocated_gib": 1.6 + 0.001 * step,
        "perf/step_time_s": seconds,
        "time/data_s": 0.02,
        "time/forward_backward_s": 0.93 * seconds,
        "time/optimizer_s": 0.03 * seconds,
        "train/loss": loss,
        "train/ppl": math.exp(loss),
        "train/grad_norm": 0.4 + 3 * math.exp(-step / 5),
        "train/lr": 1e-3 * min(1, step / 4) * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
        "train/tokens": float(step * TOKENS_PER_STEP),
        "train/target_tokens": TOKENS_PER_STEP - 20.0,
        "train/skipped_steps": 0.0,
        "perf/tokens_per_s": TOKENS_PER_STEP / seconds,
        "perf/tokens_per_s_per_gpu": TOKENS_PER_STEP / seconds / 2,
        "perf/tflops_per_gpu": 0.04 / seconds * 5,
        "perf/tflops_executed_per_gpu": 0.05 / seconds * 5,
        "balance/compute_max_over_mean": 1.02 + abs(float(rng.normal(0, 0.01))),
        "data/pack_fill": 0.98,
        "data/pad_frac": 0.02,
        "data/doc_len_p50": 900.0 + float(rng.integers(-200, 200)),
        "data/doc_len_max": 4096.0,
    }


def _extras(step: int, steps: int, seconds: float, rng: Any) -> dict[str, float]:
    return {
        "time/plan_s": 0.1,
        "time/attention_s": 0.3 * seconds,
        "time/attention_comm_s": 0.1 * seconds,
        "time/sync_s": 0.4 if step % 5 == 0 else 0.0,
        "perf/mfu": 0.38 + 0.01 * float(rng.normal()),
        "balance/tokens_max_over_mean": 1.0,
        "balance/work_max_over_mean": 1.05,
        "balance/comm_wait_frac": 0.08,
        "balance/lp_predicted_over_measured": 0.95,
        "mem/max_reserved_gib": 2.4,
        "mem/bytes_per_token_layer": 5120.0,
        "sparse/density": 0.12 + 0.02 * float(rng.random()),
        "sparse/selected_mass": 0.94,
        "elim/kept_frac": max(0.3, 1 - step / steps),
        "elim/captured_mass": 0.9,
        "comm/bytes_intra_node": 3.2e9,
        "comm/bytes_inter_node": 4.0e8,
        "sync/bytes_up": 1.1e7,
        "sync/bytes_down": 2.2e7,
        "sync/compression": 38.0,
        "sync/drift": 0.01,
        "sync/round_time_s": 0.4,
        "sync/wait_s": 0.1,
        "gpu/utilization": 92.0,
        "gpu/power_w": 640.0,
        **{f"sparse/density_by_layer/{i}": 0.05 + 0.01 * i for i in range(12)},
        **{f"elim/kept_frac_by_layer/{i}": 1.0 - 0.05 * i for i in range(12)},
    }


def write_evaluation(folder: Path, *, lengths: tuple[int, ...] = (1024, 4096, 8192)) -> Path:
    """The results.json of an evaluation in `folder`, of a model with a context of 4096."""
    folder.mkdir(parents=True, exist_ok=True)
    depths = [0.0, 0.5, 1.0]

    def cell(score: float, length: int) -> dict[str, Any]:
        dense = 1000.0 * length
        cache = {"bytes": dense / 4, "dense_bytes": dense}
        return {"score": score, "reference_loss": 3 * (1 - score), "answers": 4, "cache": cache}

    names = ("niah_single_1", "niah_multivalue", "vt", "kv_turns")
    results = {
        "schema": 2,
        "model": "model",
        "context": 4096,
        "attention": {"pattern": {"kind": "s2"}, "block": 128},
        "seed": 0,
        "samples": 4,
        "lengths": list(lengths),
        "tasks": {
            name: {str(n): cell(max(0.0, 1 - 0.2 * t - 0.1 * i), n) for i, n in enumerate(lengths)}
            for t, name in enumerate(names)
        },
        "needle": {
            "depths": depths,
            "scores": [[1 - 0.3 * d * i for i in range(len(lengths))] for d in depths],
            "reference_losses": [[0.1 + d * i for i in range(len(lengths))] for d in depths],
        },
        "perplexity": [
            {
                "window": n,
                "loss": 2.0 - 0.1 * i,
                "by_position": {str(end): 2.2 - 0.1 * k for k, end in enumerate(BUCKETS) if end <= n},
                "by_document_length": {str(end): 2.1 - 0.1 * k for k, end in enumerate(BUCKETS)},
            }
            for i, n in enumerate(lengths)
        ],
        "lm_eval": {"results": {"ruler": {"acc,none": 0.5, "alias": "ruler"}}},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder
