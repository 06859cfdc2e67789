"""One record of metrics a step, reduced over ranks and sent to the sinks of the main process."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from ltrain.config.schema import RunConfig
from ltrain.metrics import devices
from ltrain.metrics.console import make_console
from ltrain.metrics.names import METRICS
from ltrain.metrics.sinks import Fanout, JsonLines, TensorBoard, WandB
from ltrain.metrics.straggler import Straggler
from ltrain.metrics.timers import Timers
from ltrain.model.flops import step_flops
from ltrain.model.memory import bytes_per_token_layer
from ltrain.sync import SyncReport
from ltrain.train.attention_meter import AttentionMeter
from ltrain.train.batch import MicroBatch
from ltrain.train.evaluate import Evaluation
from ltrain.train.optimizer import OptimizerStep
from ltrain.train.plan import memory_setting
from ltrain.train.profile import Profiler
from ltrain.train.run import Run
from ltrain.train.step import StepResult

log = logging.getLogger("ltrain")


class Measure:
    """Collects, reduces and writes the metrics of a run."""

    def __init__(self, config: RunConfig, run: Run, timers: Timers) -> None:
        self.config, self.run, self.timers = config, run, timers
        self.main = dist.get_rank() == 0
        self.straggler = Straggler()
        self.attention = AttentionMeter(run.mesh, one_group=config.parallel.assignment.kind == "static")
        self.profiler = Profiler.of(config.profile, run.folder / "profile", dist.get_rank())
        self.peak = config.metrics.peak_tflops
        if self.peak is None and torch.cuda.is_available():
            self.peak = devices.peak_tflops(torch.cuda.get_device_name())
        self.sinks = Fanout([])
        if self.main:
            self._open_sinks()

    def _open_sinks(self) -> None:
        config, run = self.config, self.run
        self.sinks = Fanout([JsonLines(run.folder / "metrics.jsonl", run.step or None)])
        console = make_console(config.metrics.console, config.train.steps, config.run.name)
        if console is not None:
            self.sinks.add(lambda: console, "the console")
        if config.metrics.tensorboard:
            self.sinks.add(lambda: TensorBoard(run.folder / "tensorboard"), "TensorBoard")
        if config.metrics.wandb != "off":
            self.sinks.add(
                lambda: WandB(
                    run.folder,
                    mode=config.metrics.wandb,
                    project=config.metrics.wandb_project,
                    name=config.run.name,
                    tags=config.metrics.wandb_tags,
                    config={**config.model_dump(mode="json"), "environment": run.environment()},
                ),
                "Weights & Biases",
            )

    def _logs(self, step: int) -> bool:
        return step % self.config.metrics.every == 0 or step == self.config.train.steps

    def prepare(self, batches: list[MicroBatch], step: int) -> None:
        """Set counters on the micro-batches of step `step`, if it is one that is logged."""
        if self._logs(step):
            self.attention.attach(batches)

    def step(
        self,
        *,
        data: Any,
        batches: list[MicroBatch],
        result: StepResult,
        outcome: OptimizerStep,
        lr: float,
        seconds: float,
        sync: SyncReport | None = None,
        assignment: dict[str, float] | None = None,
    ) -> None:
        """Write the record of the step that has just ended; collective over the default group."""
        run, config = self.run, self.config
        times = self.timers.collect()
        # mcore reduces gradients inside its forward-backward schedule.
        times["time/forward_backward_s"] -= times.get("time/grad_sync_s", 0.0)
        if not self._logs(run.step):
            return
        local = {**times, **devices.memory_metrics(), "perf/step_time_s": seconds, **(assignment or {})}
        computing = times.get("time/forward_s", 0.0) + times.get("time/backward_s", 0.0)
        local |= self.attention.local(batches, seconds)
        local["balance/compute"] = computing - local.get("time/attention_comm_s", 0.0)
        local |= run.links.bytes_sent()
        if sync is not None:
            local |= sync.metrics
        if run.elimination is not None:
            local |= elimination_metrics(batches)
        if torch.cuda.is_available():
            local |= devices.gpu_metrics(torch.cuda.current_device())
        metrics, by_rank = reduce_over_ranks(local)
        if not self.main:
            return
        seconds = metrics["perf/step_time_s"]
        compute, work = by_rank["balance/compute"], by_rank["balance/attention_work"]
        for name in ("balance/compute", "balance/attention_work"):
            metrics.pop(name, None)
        self._name_straggler(compute)
        world = run.mesh.world_size
        lengths = [
            n for row in data.rows for n in (row.document_lengths if row.document_mask else (row.num_tokens,))
        ]
        found = [b.context.densities for b in batches if b.context.densities and b.document_lengths]
        densities = (
            [sum(d.get(i, 1.0) for d in found) / len(found) for i in range(run.spec.num_layers)]
            if found
            else None
        )
        kept = [metrics.get(f"elim/kept_frac_by_layer/{i}", 1.0) for i in range(run.spec.num_layers)]
        mode = run.elimination.config.mode if run.elimination is not None else "qkv"
        level = config.memory.level
        flops = step_flops(run.spec, lengths, densities=densities, kept=kept, mode=mode, memory_level=level)
        tflops = flops.model / seconds / world / 1e12
        metrics |= {
            "train/loss": result.loss,
            "train/ppl": math.exp(min(result.loss, 80.0)),
            "train/grad_norm": outcome.grad_norm,
            "train/lr": lr,
            "train/tokens": float(run.tokens),
            "train/target_tokens": float(result.num_targets),
            "train/skipped_steps": float(run.skipped_steps),
            "train/rollbacks": float(run.rollbacks),
            "perf/tokens_per_s": config.train.tokens_per_step / seconds,
            "perf/tokens_per_s_per_gpu": config.train.tokens_per_step / seconds / world,
            "perf/tflops_per_gpu": tflops,
            "perf/tflops_executed_per_gpu": flops.executed / seconds / world / 1e12,
            "mem/bytes_per_token_layer": bytes_per_token_layer(
                run.spec, replace(memory_setting(config, run.spec, run.mesh.data.size), kept=kept, mode=mode)
            ),
            "balance/compute_max_over_mean": max(compute) * world / sum(compute) if sum(compute) else 1.0,
            "balance/slowest_rank": float(compute.index(max(compute))),
            "balance/straggler_rank": float(self.straggler.rank),
            "balance/work_max_over_mean": max(work) * world / sum(work) if sum(work) else 1.0,
            **data.stats,
        }
        if run.elimination is not None:
            metrics["elim/kept_frac"] = sum(kept) / len(kept)
            masses = [value for name, value in metrics.items() if name.startswith(_MASS)]
            if masses:
                metrics["elim/captured_mass"] = sum(masses) / len(masses)
        if densities is not None and config.attention.pattern.kind != "dense":
            metrics["sparse/density"] = sum(densities) / len(densities)
        if self.peak is not None:
            metrics["perf/mfu"] = tflops / self.peak
        self.sinks.write(run.step, metrics)

    def _name_straggler(self, seconds: list[float]) -> None:
        if not self.straggler.add(seconds):
            return
        rank = self.straggler.rank
        if rank < 0:
            log.warning("no rank is a straggler any longer")
        else:
            text = "rank %d is a straggler: %.3f s of its own in this step, the fastest rank %.3f s"
            log.warning(text, rank, seconds[rank], min(seconds))

    def evaluation(self, outcome: Evaluation) -> None:
        """Write a held-out evaluation."""
        if self.main:
            self.sinks.write(self.run.step, outcome.metrics())

    @contextmanager
    def profile(self, step: int) -> Iterator[None]:
        """Record traces and memory of the configured steps on the configured ranks."""
        if self.profiler is None:
            yield
            return
        self.profiler.before(step)
        yield
        self.profiler.after(step)

    def close(self) -> None:
        self.sinks.close()


_KEPT, _MASS = "elim/kept_frac_by_layer/", "elim/captured_mass_by_layer/"


def elimination_metrics(batches: list[MicroBatch]) -> dict[str, float]:
    """Kept share of tokens and captured share of the score mass of this stage's layers, means over
    micro-batches; empty where no layer dropped a token."""
    found = [batch.context.eliminated for batch in batches if batch.context.eliminated]
    metrics = {}
    for layer in sorted({layer for values in found for layer in values}):
        kept, mass = zip(*(values[layer] for values in found if layer in values), strict=True)
        metrics[f"{_KEPT}{layer}"] = sum(kept) / len(kept)
        metrics[f"{_MASS}{layer}"] = sum(mass) / len(mass)
    return metrics


def reduce_over_ranks(local: dict[str, float]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Reduce over all ranks, each metric by its declared rule; also return each metric's values by rank.

    Ranks may hold different names; a name that a rank does not hold counts as 0 there.
    """
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    names = sorted({name for values in gathered for name in values})
    reduced, by_rank = {}, {}
    for name in names:
        values = [v.get(name, 0.0) for v in gathered]
        mean = sum(values) / len(values)
        by_rank[name] = values
        rule = METRICS[name].reduction if name in METRICS else "max"
        reduced[name] = {"sum": sum(values), "mean": mean, "max": max(values), "last": values[0]}[rule]
    return reduced, by_rank
