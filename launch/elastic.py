"""torchrun with exit codes that mean something: launch/elastic.py [TORCHRUN OPTIONS] launch/train.py CONFIG

A worker that crashed or was killed is restarted with its group, `--max-restarts` times. A worker that ended
for a reason that a restart cannot mend is not: wrong input (2), no usable checkpoint (3), out of a resource
(4), stopped on request (75). Such a code is the launcher's own, also after a signal that it passed on; plain
torchrun restarts those workers as well, and ends with 1 in every case.

After a crash the other workers have `GRACE_S` seconds until they are killed; torchrun gives a hung one 30.
After a signal they have `--shutdown-timeout` seconds, which has to be enough for a checkpoint.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Iterable
from typing import Any

from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

FINAL = (2, 3, 4, 75, 130)
GRACE_S = 5

log = logging.getLogger("ltrain.launch")


class Agent(LocalElasticAgent):
    """torchrun's agent of one node, which knows which exit codes are final."""

    running: Agent | None = None

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        Agent.running = self
        started: dict[int, Any] = super()._start_workers(worker_group)
        assert self._pcontext is not None
        close = self._pcontext.close

        def close_soon(death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
            # 30 is the default of torchrun's calls after a failure; after a signal it passes its own setting.
            close(death_sig, GRACE_S if timeout == 30 else timeout)

        self._pcontext.close = close_soon  # type: ignore[method-assign]
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        for rank, failure in result.failures.items() if result.is_failed() else ():
            print(f"ltrain: rank {rank} {reason(failure.exitcode)}", file=sys.stderr, flush=True)
            if failure.exitcode in FINAL:
                self._remaining_restarts = 0
        return result

    def exit_codes(self) -> list[int]:
        """Exit codes of this node's workers that have ended."""
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        return [h.proc.returncode for h in handlers.values() if h.proc.returncode is not None]


def reason(code: int) -> str:
    """Why a worker ended, in words."""
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL): by the system, where the host's memory is full, or by a person"
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    known = {
        2: "refused its input",
        3: "found no usable checkpoint",
        4: "ran out of a resource, or diverged",
        75: "stopped on request; the same command continues the run",
        130: "was interrupted twice",
    }
    return f"ended with code {code}" + (f": {known[code]}" if code in known else "")


def exit_code(codes: Iterable[int]) -> int:
    """The launcher's code for its workers' codes: a final one before a crash, a crash before success."""
    codes = list(codes)
    final = [code for code in FINAL if code in codes]
    if final:
        return final[0]
    return 1 if any(codes) or not codes else 0


def main(arguments: list[str] | None = None) -> int:
    # The agent is made by name inside torchrun's launcher; there is no argument for another class.
    api.LocalElasticAgent = Agent  # type: ignore[misc]
    args = torchrun.parse_args(arguments)
    if args.shutdown_timeout == 30:
        args.shutdown_timeout = 300
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        torchrun.run(args)
    except ChildFailedError as error:
        return exit_code(failure.exitcode for failure in error.failures.values())
    except SignalException as error:
        codes = Agent.running.exit_codes() if Agent.running is not None else []
        return exit_code(codes) if codes else 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
