"""Run a function on several gloo ranks, each its own process, from a test."""

from __future__ import annotations

import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ltrain.parallel.seam  # noqa: F401  before mcore, whose import is then cheaper


def _rank_main(
    rank: int, world_size: int, store: str, fn: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=90),
        )
        results.put((rank, True, fn(rank, world_size, *args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on `world_size` gloo ranks; return the results by rank.

    `fn` must be importable (module level) and its arguments and result picklable; return numpy arrays or
    Python values rather than tensors. Raises AssertionError with the first failing rank's traceback.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        processes = [
            context.Process(
                target=_rank_main,
                args=(rank, world_size, os.path.join(folder, "store"), fn, args, results),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        done: dict[int, Any] = {}
        try:
            while len(done) < world_size:
                try:
                    rank, ok, value = results.get(timeout=timeout_s)
                except queue.Empty:
                    raise AssertionError(
                        f"ranks {sorted(set(range(world_size)) - set(done))} gave no result"
                    ) from None
                assert ok, f"rank {rank} failed:\n{value}"
                done[rank] = value
        finally:
            for process in processes:
                process.join(timeout=5 if len(done) == world_size else 0.2)
                if process.is_alive():
                    process.kill()
    return [done[rank] for rank in range(world_size)]
