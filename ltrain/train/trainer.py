"""The training loop."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from typing import Any

import torch.distributed as dist

from ltrain.config.schema import RunConfig
from ltrain.metrics.timers import EngineTimers, Timers
from ltrain.train.checkpoint.folder import CheckpointError
from ltrain.train.evaluate import evaluate
from ltrain.train.measure import Measure
from ltrain.train.optimizer import learning_rate, optimizer_step, set_learning_rate
from ltrain.train.run import Run
from ltrain.train.signals import EXIT_STOPPED, StopRequest
from ltrain.train.step import reduce_totals, run_model
from ltrain.train.watch import RankLost, Watch

log = logging.getLogger("ltrain")

EXIT_DONE = 0
EXIT_RESOURCES = 4


class Trainer:
    """Trains one run from where it stands to its last step, and leaves a state from which it can go on."""

    def __init__(self, config: RunConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.timers = Timers()
        run.ddp.module.config.timers = EngineTimers(self.timers)
        self.measure = Measure(config, run, self.timers)
        self.stop = StopRequest(config.train.max_minutes)
        self.watch = Watch(run.folder / "hang", config.train.timeout_s, self.position)
        self._losses: deque[float] = deque(maxlen=50)
        self._nonfinite_in_a_row = 0

    def position(self) -> tuple[int, str, int]:
        """The step under way, the phase, and a number that changes with every phase."""
        return self.run.step + 1, self.timers.current, self.timers.changes

    def train(self) -> int:
        """Run to the end. Returns the exit code: 0 done, 75 stopped on request, 4 out of a resource.

        Raises RankLost, with what every rank was doing, when a collective operation fails.
        """
        try:
            return self._train()
        except RuntimeError as error:
            explained = self.watch.explain(error)
            if explained is None:
                raise
            raise RankLost(explained) from error
        finally:
            self.watch.close()
            self.run.checkpoints.close()
            self.run.replicas.close()
            self.run.assignment.close()
            self.measure.close()
            self.stop.restore()

    def _train(self) -> int:
        run, config = self.run, self.config
        run.assignment.start()
        if run.step == 0 and config.eval.at_start:
            self.evaluate()
        run.replicas.join()
        while run.step < config.train.steps:
            reason = self.stop.agreed(run.mesh.device)
            if reason is not None:
                return self._leave(reason)
            self.one_step()
            if run.step == config.train.steps:
                break
            if config.eval.every and run.step % config.eval.every == 0:
                self.evaluate()
            if config.checkpoint.every and run.step % config.checkpoint.every == 0:
                self.save()
                if run.checkpoints.failure and config.checkpoint.on_full_disk == "stop":
                    log.error("stopping: a checkpoint could not be written (%s)", run.checkpoints.failure)
                    return EXIT_RESOURCES
        run.replicas.finish()
        if config.eval.at_end and (run.step > 0 or not config.eval.at_start):
            self.evaluate()
        self.save(wait=True)
        return EXIT_DONE

    def one_step(self) -> None:
        """Load, forward, backward, step, measure."""
        run, config, timers = self.run, self.config, self.timers
        began = time.perf_counter()
        with timers.phase("data", host=True):
            data = run.loader.next_step()
            batches = run.assignment.batches(data.rows)
        if run.elimination is not None:
            run.elimination.step = run.step
        run.ddp.zero_grad_buffer()
        run.optimizer.zero_grad()
        with self.measure.profile(run.step + 1):
            with timers.phase("forward_backward"):
                totals = run_model(run.ddp, run.mesh, batches, train=True, times=run.assignment.times)
            result = reduce_totals(totals, run.mesh)
            lr = learning_rate(config.schedule, config.optimizer.lr, run.step, config.train.steps)
            set_learning_rate(run.optimizer, lr)
            with timers.phase("optimizer"):
                outcome = optimizer_step(run.optimizer, config.optimizer.max_grad_norm)
            run.links.after_step()
        run.step += 1
        with timers.phase("sync", host=True):
            report = run.replicas.after_step(run.step)
        planned = run.assignment.after_step(run.step)
        run.tokens += config.train.tokens_per_step
        self._guard(result.loss, outcome.skipped)
        self.measure.step(
            data=data,
            batches=batches,
            result=result,
            outcome=outcome,
            lr=lr,
            seconds=time.perf_counter() - began,
            sync=report,
            assignment=planned,
        )

    def evaluate(self) -> None:
        """Log the held-out loss by position, if there is held-out text.

        Before the first step the model is measured as it came, with its own rotary embedding.
        """
        run = self.run
        if not run.held_out:
            return
        rope = run.source_rope if run.step == 0 else None
        run.ddp.module.config.timers = None  # its forward is none of a step's
        with self.timers.phase("evaluation", host=True):
            outcome = evaluate(run.ddp, run.mesh, run.held_out, run.buckets, run.assignment, rope)
        run.ddp.module.config.timers = EngineTimers(self.timers)
        self.measure.evaluation(outcome)

    def save(self, *, wait: bool = False) -> None:
        """Save a checkpoint; training waits only for the copy to host memory."""
        run = self.run
        if run.checkpoints.last_saved == run.step:
            return
        with self.timers.phase("checkpoint", host=True):
            run.checkpoints.save(run.snapshot(), wait=wait)

    def _leave(self, reason: str) -> int:
        run = self.run
        self.save(wait=True)
        if dist.get_rank() == 0:
            for marker in (run.folder / "PREEMPTED", self.config.run.stop_marker):
                if marker is not None:
                    marker.write_text(f"{run.checkpoints.last_saved or 0}\n")
            text = "stopped at step %d (%s); the same command continues from step %d"
            log.info(text, run.step, reason, run.checkpoints.last_saved or 0)
        return EXIT_STOPPED

    def _guard(self, loss: float, skipped: bool) -> None:
        """Count skipped steps, and react to non-finite runs and loss spikes as configured."""
        run, train = self.run, self.config.train
        if skipped:
            run.skipped_steps += 1
            self._nonfinite_in_a_row += 1
            if self._nonfinite_in_a_row >= train.nonfinite_limit:
                count = self._nonfinite_in_a_row
                raise NonFinite(
                    f"the gradient was not finite in {count} steps in a row, up to step {run.step}"
                )
            return
        self._nonfinite_in_a_row = 0
        if not math.isfinite(loss):
            return
        spike = (
            train.rollback_factor is not None
            and len(self._losses) >= 10
            and loss > train.rollback_factor * statistics.median(self._losses)
        )
        if spike:
            self._roll_back(loss)
        else:
            self._losses.append(loss)

    def _roll_back(self, loss: float) -> None:
        run = self.run
        if run.rollbacks >= self.config.train.rollback_limit:
            raise NonFinite(f"the loss rose to {loss:.3f} again after {run.rollbacks} rollbacks")
        position: Any = run.loader.state_dict()
        reader = run.checkpoints.open_newest()
        if reader is None:
            raise CheckpointError(f"the loss rose to {loss:.3f} and there is no checkpoint to go back to")
        spike_step, rollbacks, skipped = run.step, run.rollbacks + 1, run.skipped_steps
        run.restore(reader)
        run.loader.load_state_dict(position)  # the batches that led to the spike are not seen again
        run.rollbacks, run.skipped_steps = rollbacks, skipped
        self._losses.clear()
        log.warning(
            "loss %.3f at step %d: back to step %d, its batches are skipped", loss, spike_step, run.step
        )


class NonFinite(Exception):
    """Training cannot go on: gradients or losses are out of bounds."""
