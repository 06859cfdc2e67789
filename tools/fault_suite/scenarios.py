"""The faults: where each strikes, what it must cost, and how the job goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fault_suite import damage, flows
from fault_suite.job import EVERY, Job

Fault = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """A fault and what it must cost.

    `codes` are the exit codes of the launches, in order: a launch after the first is the same command again,
    without faults. `most_repeated` bounds the optimizer steps that are done more than once. The run must end
    with the losses and the state of one without faults, bit for bit, unless `equal` is False. `says` must
    occur in the output. `half` starts from a job that was stopped after step 6; `prepare` then damages it.
    """

    name: str
    kind: str
    must: str
    faults: tuple[Fault, ...] = ()
    overrides: tuple[str, ...] = ()
    codes: tuple[int, ...] = (0,)
    most_repeated: int = 0
    equal: bool = True
    says: tuple[str, ...] = ()
    half: bool = False
    prepare: Callable[[Job], None] | None = None
    flow: Callable[[Job, Scenario], None] | None = None
    check: Callable[[Job], list[str]] = field(default=lambda job: [])
    needs_root: bool = False


ASYNC = ("--checkpoint.asynchronous", "true")
CP = ("--parallel.context.degree", "2")
KILLED = "was killed (SIGKILL)"
RESTART = f"restart, at most {EVERY} steps again"


def _kill(point: str, rank: int, step: int | None = None, nth: int = 1) -> tuple[Fault, ...]:
    when = {"nth": nth} if step is None else {"step": step}
    return ({"point": point, "rank": rank, "action": "kill", **when},)


def _killed(name: str, where: str, faults: tuple[Fault, ...], **more: Any) -> Scenario:
    settings = {"must": RESTART, "most_repeated": EVERY, "says": (KILLED,), **more}
    return Scenario(name, f"kill -9 {where}", faults=faults, **settings)


def _signalled(name: str, kind: str, fault: Fault, **more: Any) -> Scenario:
    must = "stop with 75 after a checkpoint; no step again"
    return Scenario(name, kind, **{"must": must, "codes": (75, 0), "faults": (fault,), **more})


def _damaged(name: str, kind: str, prepare: Callable[[Job], None], **more: Any) -> Scenario:
    settings = {
        "must": f"named and set aside, the one before is used: {EVERY} steps again",
        "most_repeated": EVERY,
        "says": ("was set aside",),
        **more,
    }
    return Scenario(name, kind, half=True, prepare=prepare, **settings)


KILLS = (
    _killed("kill-data", "waiting for data", _kill("data", 1, 5)),
    _killed("kill-forward", "in forward", _kill("forward", 0, 4)),
    _killed("kill-backward", "in backward", _kill("backward", 1, 5)),
    _killed("kill-grad-sync", "in gradient reduction", _kill("grad_sync", 0, 7)),
    _killed("kill-all-reduce", "in an all-reduce", _kill("all_reduce", 1, 4)),
    _killed("kill-optimizer", "before the optimizer step", _kill("optimizer", 1, 6)),
    _killed("kill-optimizer-done", "after the optimizer step", _kill("optimizer_done", 0, 5)),
    _killed("kill-first-step", "in the first step, before any checkpoint", _kill("backward", 1, 1)),
    _killed("kill-ring", "in forward, context parallel", _kill("forward", 1, 5), overrides=CP),
    _killed(
        "kill-three-times",
        "three times in one job",
        (*_kill("forward", 1, 3), *_kill("backward", 0, 5), *_kill("optimizer", 1, 7)),
        most_repeated=3 * EVERY,
        must=f"three restarts, at most {3 * EVERY} steps again",
    ),
    _killed(
        "kill-tokenise", "while the data cache is written", _kill("tokenise", 0, nth=20), most_repeated=0
    ),
    _killed(
        "kill-checkpoint-begin", "before a checkpoint's folder exists", _kill("checkpoint_begin", 0, nth=2)
    ),
    _killed("kill-checkpoint-shard", "before a rank writes its tensors", _kill("checkpoint_shard", 1, nth=2)),
    _killed(
        "kill-checkpoint-torn",
        "with half of a rank's tensors written",
        ({"point": "checkpoint_shard_done", "rank": 1, "action": "cut_in_half", "nth": 2},),
    ),
    _killed("kill-checkpoint-shard-done", "before the vote", _kill("checkpoint_shard_done", 0, nth=2)),
    _killed("kill-checkpoint-manifest", "before the manifest", _kill("checkpoint_manifest", 0, nth=2)),
    _killed("kill-checkpoint-marker", "before the marker", _kill("checkpoint_marker", 0, nth=2)),
    _killed("kill-checkpoint-rename", "before the rename", _kill("checkpoint_rename", 0, nth=2)),
    _killed("kill-checkpoint-renamed", "just after the rename", _kill("checkpoint_renamed", 0, nth=2)),
    _killed(
        "kill-checkpoint-remove", "while an old checkpoint is removed", _kill("checkpoint_remove", 0, nth=1)
    ),
    _killed(
        "kill-checkpoint-async",
        "while a checkpoint is written in the background",
        _kill("checkpoint_shard", 1, nth=2),
        overrides=ASYNC,
        most_repeated=2 * EVERY,
        must=f"restart, at most {2 * EVERY} steps again",
    ),
    Scenario(
        "kill-launcher",
        "kill -9 of the launcher",
        "no orphan trains on; the same command goes on",
        flow=flows.kill_launcher,
        most_repeated=EVERY,
    ),
    Scenario(
        "lost-rendezvous",
        "the launcher that holds the rendezvous is killed, of two",
        "both nodes end within a minute; the same commands go on",
        flow=flows.lose_rendezvous,
        most_repeated=EVERY,
    ),
)

STOPS = (
    _signalled(
        "sigterm",
        "SIGTERM to the launcher",
        {"point": "step", "rank": 0, "step": 5, "action": "signal", "signal": "SIGTERM", "to": "launcher"},
    ),
    _signalled(
        "sigusr1",
        "SIGUSR1 to the launcher",
        {"point": "step", "rank": 1, "step": 5, "action": "signal", "signal": "SIGUSR1", "to": "launcher"},
    ),
    _signalled(
        "sigint",
        "Ctrl-C",
        {"point": "step", "rank": 0, "step": 3, "action": "signal", "signal": "SIGINT"},
    ),
    _signalled(
        "sigint-twice",
        "Ctrl-C twice",
        {"point": "step", "rank": 0, "step": 5, "action": "signal", "signal": "SIGINT", "times": 2},
        must=f"leave at once with 130, at most {EVERY} steps again",
        codes=(130, 0),
        most_repeated=EVERY,
        says=("leaving without a checkpoint",),
    ),
    _signalled(
        "sigusr1-one-rank",
        "SIGUSR1 to one rank only",
        {"point": "forward", "rank": 1, "step": 5, "action": "signal", "signal": "SIGUSR1"},
    ),
    _signalled(
        "sigterm-while-saving",
        "SIGTERM while a checkpoint is written",
        {"point": "checkpoint_shard", "rank": 1, "nth": 2, "action": "signal", "signal": "SIGTERM"},
    ),
    Scenario(
        "deadline",
        "train.max_minutes is over",
        "stop with 75 after a checkpoint; no step again, no restart",
        ({"point": "step", "rank": 1, "step": 4, "action": "sleep", "seconds": 3},),
        flow=flows.with_deadline,
        codes=(75, 0),
    ),
)

DAMAGE = (
    _damaged("checkpoint-cut", "a truncated checkpoint file", damage.cut_short),
    _damaged("checkpoint-bit", "one flipped bit in a checkpoint", damage.flip_a_bit),
    _damaged("checkpoint-missing", "a missing checkpoint file", damage.remove_a_file),
    _damaged("checkpoint-unmarked", "a checkpoint without its marker", damage.remove_the_marker, says=()),
    _damaged("checkpoint-forged-header", "a forged tensor header of 2^62 bytes", damage.forge_header),
    _damaged("checkpoint-forged-shape", "a forged index of 2^50 elements", damage.forge_shape),
    _damaged("checkpoint-forged-state", "a forged state", damage.forge_state),
    _damaged("checkpoint-link", "a checkpoint file that is a link to outside", damage.link_outside),
    _damaged("checkpoint-name", "a manifest that names a file outside", damage.name_outside),
    _damaged(
        "checkpoint-pickle",
        "a pickle in place of the tensors",
        damage.plant_pickle,
        check=lambda job: ["the pickle was executed"] if (job.folder / "executed").exists() else [],
    ),
    _damaged(
        "checkpoint-none",
        "no whole checkpoint is left",
        damage.damage_all,
        must="stop with 3; nothing starts from random weights",
        codes=(3,),
        equal=False,
        says=("is whole; set checkpoint.resume=false",),
    ),
    _damaged(
        "metrics-cut",
        "a damaged end of metrics.jsonl",
        damage.cut_metrics,
        must="the rest is kept; no step again",
        most_repeated=0,
        says=(),
    ),
    _damaged(
        "cache-cut",
        "a truncated data cache",
        damage.cut_data_cache,
        must="named and made again; no step again",
        most_repeated=0,
        says=("is made again",),
        flow=flows.same_folder,
    ),
    Scenario(
        "build-lock",
        "a lock left by a killed build of the C++ kernel",
        "no wait for a process that is gone",
        flow=flows.stale_build,
    ),
)

RESOURCES = (
    Scenario(
        "disk-full",
        "the disk is full at a checkpoint, then free again",
        "a warning, training goes on, the next checkpoint is whole",
        flow=flows.full_disk,
        says=("the disk is full (ENOSPC)",),
        needs_root=True,
    ),
    Scenario(
        "disk-full-stop",
        "the disk is full, checkpoint.on_full_disk=stop",
        f"stop with 4, older checkpoints whole, {EVERY} steps again",
        overrides=("--checkpoint.on_full_disk", "stop"),
        flow=flows.full_disk,
        codes=(4, 0),
        most_repeated=EVERY,
        needs_root=True,
    ),
    Scenario(
        "read-only",
        "the run folder cannot be written",
        "refused with 2 before anything starts; no step again",
        flow=flows.read_only,
        codes=(2, 0),
        says=("cannot be written",),
        needs_root=True,
    ),
    Scenario(
        "device-memory",
        "out of device memory on one rank",
        f"stop with 4 and what to change, {EVERY} steps again",
        ({"point": "forward", "rank": 1, "step": 5, "action": "fail", "error": "device memory"},),
        codes=(4, 0),
        most_repeated=EVERY,
        says=("out of device memory", "memory.level"),
    ),
    Scenario(
        "host-memory",
        "out of host memory on one rank",
        f"stop with 4 and what to change, {EVERY} steps again",
        ({"point": "backward", "rank": 0, "step": 5, "action": "fail", "error": "host memory"},),
        codes=(4, 0),
        most_repeated=EVERY,
        says=("out of host memory",),
    ),
    Scenario(
        "two-jobs",
        "a second job on the same run folder",
        "refused with 2; the first is undisturbed",
        ({"point": "step", "rank": 0, "step": 3, "action": "sleep", "seconds": 40},),
        flow=flows.second_job,
        codes=(2, 0),
        says=("is being written by process",),
    ),
)

NUMBERS = (
    Scenario(
        "nan-gradient",
        "a NaN gradient on one rank",
        "one step skipped on all ranks and counted",
        ({"point": "backward", "rank": 1, "step": 5, "action": "scale", "factor": "nan"},),
        equal=False,
        check=flows.one_skipped_step,
    ),
    Scenario(
        "nan-for-good",
        "NaN gradients in every step",
        "stop with 4 after train.nonfinite_limit steps",
        ({"point": "backward", "rank": 0, "step": 4, "action": "scale", "factor": "nan", "repeat": True},),
        ("--train.nonfinite_limit", "3"),
        codes=(4,),
        equal=False,
        says=("was not finite in 3 steps in a row",),
    ),
    Scenario(
        "loss-spike",
        "a loss spike, train.rollback_factor set",
        "back to the checkpoint once, its batches skipped",
        ({"point": "loss", "step": 14, "action": "scale", "factor": 100},),
        ("--train.rollback_factor", "3", "--train.steps", "16"),
        equal=False,
        most_repeated=EVERY + 1,
        says=("back to step 12",),
        check=flows.one_rollback,
    ),
)

TIME = (
    Scenario(
        "stopped-rank",
        "a rank that is stopped (SIGSTOP)",
        "named by the others at the time-out, killed, restarted",
        ({"point": "forward", "rank": 1, "step": 5, "action": "signal", "signal": "SIGSTOP"},),
        ("--train.timeout_s", "8"),
        most_repeated=EVERY,
        says=("rank 1 (process", "is silent, dead or stopped: last seen in step 5, forward"),
    ),
    Scenario(
        "hung-rank",
        "a rank that hangs in its own code",
        "named by the others at the time-out, killed, restarted",
        ({"point": "data", "rank": 0, "step": 5, "action": "sleep", "seconds": 600},),
        ("--train.timeout_s", "8"),
        most_repeated=EVERY,
        says=("rank 0 (process", "lags: step 5, data"),
    ),
    Scenario(
        "slow-rank",
        "a rank that is slow for good",
        "named as a straggler; nothing stops",
        ({"point": "forward", "rank": 1, "step": 1, "action": "sleep", "seconds": 0.1, "repeat": True},),
        ("--train.steps", "66", "--checkpoint.every", "0"),
        equal=False,
        says=("rank 1 is a straggler",),
    ),
    Scenario(
        "clock-jump",
        "the clock jumps ten days ahead, train.max_minutes set",
        "nothing",
        ({"point": "step", "step": 4, "action": "set_clock", "seconds": 864000},),
        ("--train.max_minutes", "30"),
    ),
    Scenario(
        "crash",
        "an unexpected exception on one rank",
        RESTART,
        ({"point": "forward", "rank": 1, "step": 6, "action": "fail", "error": "bug"},),
        most_repeated=EVERY,
        says=("ValueError: injected",),
    ),
)

SCENARIOS = (*KILLS, *STOPS, *DAMAGE, *RESOURCES, *NUMBERS, *TIME)
