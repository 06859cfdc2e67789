"""A rank's program: `ltrain train`, killed once where a marker asks for it. MARKER CONFIG [overrides]."""

import os
import signal
import sys
from pathlib import Path

from ltrain.cli import main
from ltrain.train.trainer import Trainer

KILLED_BEFORE_STEP = 4


def kill_once(marker: Path) -> None:
    """Rank 1 dies in the middle of training, the first time that it comes so far."""
    one_step = Trainer.one_step

    def step_or_die(self: Trainer) -> None:
        if self.run.step == KILLED_BEFORE_STEP - 1 and os.environ["RANK"] == "1" and marker.exists():
            marker.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        one_step(self)

    Trainer.one_step = step_or_die  # type: ignore[method-assign]


if __name__ == "__main__":
    kill_once(Path(sys.argv[1]))
    sys.exit(main(["train", *sys.argv[2:]]))
