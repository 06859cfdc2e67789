"""From a configuration to a finished run: build, restore, train, export."""

from __future__ import annotations

import errno
import logging
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from ltrain.attention import patterns
from ltrain.config.base import ConfigError
from ltrain.config.schema import RunConfig
from ltrain.data.loader import open_corpus
from ltrain.model.spec import model_fingerprint
from ltrain.parallel import seam
from ltrain.parallel.mesh import init_process_group
from ltrain.sync import SyncError, SyncRefused
from ltrain.train.build import build_run
from ltrain.train.checkpoint.folder import CheckpointError
from ltrain.train.checkpoint.manager import CheckpointManager
from ltrain.train.plan import check_assignment, check_device, check_run, run_folder, write_config
from ltrain.train.run import Run
from ltrain.train.signals import die_with_parent
from ltrain.train.trainer import NonFinite, Trainer
from ltrain.train.watch import RankLost
from ltrain.train.writer import Writer

log = logging.getLogger("ltrain")

EXIT_CRASHED = 1
EXIT_BAD_INPUT = 2
EXIT_CHECKPOINT = 3
EXIT_RESOURCES = 4


def train(config: RunConfig) -> int:
    """Run a training job, or this process's rank of it. Returns the exit code.

    0 done; 2 the input is wrong, or the other replicas refuse it; 3 no usable checkpoint; 4 out of a
    resource, other replicas not reached, or training diverged; 75 stopped on request. Input is checked before
    a process group starts.
    """
    die_with_parent()
    check_device(config)
    plan = check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    main_process = os.environ.get("RANK", "0") == "0"
    if not main_process:
        log.setLevel(logging.WARNING)
    writer = Writer(run_folder(config)) if main_process else None
    try:
        # Bad data is found, and new data tokenised (by one process; others wait), while no group can time
        # out.
        check_assignment(config, plan, open_corpus(config.data, plan.tokenizer))
        return _in_group(config, lambda: _train(config, writer))
    finally:
        if writer is not None:
            writer.release()


def _in_group(config: RunConfig, work: Callable[[], int]) -> int:
    """Do `work` on the default process group; its failures become exit codes. ConfigError is passed on."""
    init_process_group(config.train.timeout_s)
    try:
        return work()
    except ConfigError:
        raise
    except (CheckpointError, NonFinite) as error:
        log.error("%s", error)
        return EXIT_CHECKPOINT if isinstance(error, CheckpointError) else EXIT_RESOURCES
    except SyncError as error:
        log.error("%s", error)
        return EXIT_BAD_INPUT if isinstance(error, SyncRefused) else EXIT_RESOURCES
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        log.error("rank %d: out of device memory (%s). %s", dist.get_rank(), reason, _LEVERS)
        return EXIT_RESOURCES
    except RankLost as error:
        log.error("%s", error)
        return EXIT_CRASHED
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        log.error("rank %d: %s cannot be written: %s", dist.get_rank(), error.filename, error.strerror)
        return EXIT_RESOURCES
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            log.error("rank %d: out of host memory. %s", dist.get_rank(), _LEVERS)
            return EXIT_RESOURCES
        log.error("rank %d failed:\n%s", dist.get_rank(), traceback.format_exc())
        return EXIT_CRASHED
    finally:
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_LEVERS = (
    "In this order: a higher memory.level, a larger parallel.context.degree, a smaller "
    "train.loss_chunk_tokens, optimizer.kind=cpu_adam."
)


def _train(config: RunConfig, writer: Writer | None) -> int:
    set_seed(config.run.seed)
    torch.use_deterministic_algorithms(config.train.deterministic, warn_only=True)
    run = build_run(config)
    if writer is not None:
        run.checkpoints.fence = writer.check
    if dist.get_rank() == 0:
        write_config(config, run.folder)
        (run.folder / "PREEMPTED").unlink(missing_ok=True)
    restore(config, run)
    if dist.get_rank() == 0:
        for line in run.banner():
            log.info("%s", line)
    code = Trainer(config, run).train()
    # The launcher ends all ranks when the first has left: none may, before markers and records are written.
    dist.barrier()
    if code == 0 and config.checkpoint.export:
        export_run(run, run.folder / "hf")
        if dist.get_rank() == 0:
            log.info("model: %s", run.folder / "hf")
    return code


def restore(config: RunConfig, run: Run) -> None:
    """Continue from the run's newest whole checkpoint, or start from another run's parameters."""
    reader = run.checkpoints.open_newest() if config.checkpoint.resume else None
    if reader is not None:
        if reader.state["fingerprint"] != model_fingerprint(run.spec):
            raise ConfigError(
                "run.name", config.run.name, "has checkpoints of another model", "choose another name"
            )
        run.restore(reader)
        log.info("continuing at step %d", run.step)
    elif config.checkpoint.init_from is not None:
        source = config.checkpoint.init_from
        problem = run.checkpoints.check(source)
        if problem is not None:
            raise ConfigError("checkpoint.init_from", str(source), problem)
        from ltrain.train.checkpoint.reading import CheckpointReader

        run.restore_parameters(CheckpointReader(source))
        log.info("parameters from %s", source)


def export_run(run: Run, folder: Path) -> None:
    """Write the model as a Hugging Face folder with its new context; collective."""
    from ltrain.config.model import LoraAdapter
    from ltrain.model.weights import export_adapter, export_model

    export_model(
        run.model,
        run.spec,
        run.mesh,
        folder,
        tokenizer=run.tokenizer,
        pattern=patterns.from_config(run.config.attention.pattern),
        block=run.config.parallel.context.block,
    )
    adapter = run.config.model.adapter
    if isinstance(adapter, LoraAdapter) and not adapter.also_train:
        export_adapter(run.model, run.spec, adapter, run.mesh, folder.with_name(f"{folder.name}-adapter"))


def export(config: RunConfig, out: Path | None, step: int | None) -> int:
    """Write a checkpoint of a run as a Hugging Face folder."""
    check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    return _in_group(config, lambda: _export(config, out, step))


def _export(config: RunConfig, out: Path | None, step: int | None) -> int:
    run = build_run(config)
    checkpoints: CheckpointManager = run.checkpoints
    reader = checkpoints.open_newest(None if step is None else step + 1)
    if reader is None or (step is not None and reader.state["step"] != step):
        raise ConfigError("--step", step, f"is not a whole checkpoint in {checkpoints.root}")
    run.restore(reader)
    folder = out or run.folder / "hf"
    export_run(run, folder)
    log.info("step %d exported to %s", run.step, folder)
    return 0


def set_seed(seed: int) -> None:
    """Seed every generator of this process; the ranks of a model share a seed, so that copies stay equal."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)
    if not seam.on_cpu():
        torch.cuda.manual_seed(seed)
