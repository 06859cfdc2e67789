"""The planning process: reads requests from standard input, writes plans to standard output, as pickled
frames.

Started by `PlanAhead` as `python -m ltrain.planner.worker`; it imports no torch.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
from typing import Any, BinaryIO

from ltrain.planner.solve import plan_batch

_HEADER = struct.Struct("<Q")


def write_frame(stream: BinaryIO, value: Any) -> None:
    """Write one length-prefixed pickle."""
    data = pickle.dumps(value)
    stream.write(_HEADER.pack(len(data)) + data)
    stream.flush()


def read_frame(stream: BinaryIO) -> Any:
    """Read one frame. Raises EOFError at the end of the stream or on a cut frame."""
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise EOFError
    (size,) = _HEADER.unpack(header)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


def main() -> None:
    # Solvers print to standard output; the frames keep it for themselves.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            step, lengths, cluster, cost, options = read_frame(sys.stdin.buffer)
        except EOFError:
            return
        try:
            plan = plan_batch(lengths, cluster, cost, **options)
            write_frame(replies, (step, plan.to_json(), plan.solve_s, None))
        except Exception as error:
            write_frame(replies, (step, None, 0.0, f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    main()
