"""What a person sees while a run goes on: a live panel on a terminal, one line a step elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

_SPARKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float], width: int = 40) -> str:
    """Values as a row of eight-level bars, the latest at the right."""
    values = [v for v in values if v == v][-width:]
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(_SPARKS[min(7, int(8 * (v - low) / span))] for v in values)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def plain_line(step: int, total: int, metrics: dict[str, float]) -> str:
    """One step as one line, with units."""
    parts = [time.strftime("%H:%M:%S"), f"step {step}/{total}", f"loss {metrics['train/loss']:.4f}"]
    if "train/grad_norm" in metrics:
        parts.append(f"grad norm {metrics['train/grad_norm']:.3f}")
    if "train/lr" in metrics:
        parts.append(f"lr {metrics['train/lr']:.2e}")
    parts.append(f"{metrics.get('perf/tokens_per_s', 0):,.0f} tokens/s")
    if "perf/mfu" in metrics:
        parts.append(f"MFU {100 * metrics['perf/mfu']:.1f} %")
    parts.append(f"{metrics.get('mem/max_allocated_gib', 0):.2f} GiB")
    if "balance/compute_max_over_mean" in metrics:
        parts.append(f"balance {metrics['balance/compute_max_over_mean']:.2f}")
    if metrics.get("train/skipped_steps"):
        parts.append(f"skipped {metrics['train/skipped_steps']:.0f}")
    return "  ".join(parts)


class PlainConsole:
    """One line a logged step; for logs and pipes."""

    def __init__(self, total: int) -> None:
        self.total = total

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if "train/loss" in metrics:
            print(plain_line(step, self.total, metrics), flush=True)
        elif "eval/loss" in metrics:
            print(f"{time.strftime('%H:%M:%S')}  held-out loss {metrics['eval/loss']:.4f}", flush=True)

    def close(self) -> None:
        pass


class LiveConsole:
    """A panel that is redrawn in place: progress and ETA, loss with its recent course, speed, memory,
    balance.
    """

    def __init__(self, total: int, title: str) -> None:
        from rich.live import Live

        self.total, self.title = total, title
        self._losses: deque[float] = deque(maxlen=200)
        self._began: tuple[float, int] | None = None
        self._held_out = ""
        self._live = Live(refresh_per_second=4, transient=False)
        self._live.start()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if "eval/loss" in metrics and "train/loss" not in metrics:
            self._held_out = f"{metrics['eval/loss']:.4f} at step {step}"
        if "train/loss" not in metrics:
            return
        self._began = self._began or (time.monotonic(), step)
        self._losses.append(metrics["train/loss"])
        self._live.update(self._panel(step, metrics))

    def _panel(self, step: int, metrics: dict[str, float]) -> Any:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        assert self._began is not None
        began, first = self._began
        done = step - first
        rest = (time.monotonic() - began) / done * (self.total - step) if done else float("nan")
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(ratio=1)
        table.add_row(f"step {step}/{self.total}", ProgressBar(total=self.total, completed=step))
        table.add_row("ETA", duration(rest) if rest == rest else "...")
        table.add_row("loss", f"{metrics['train/loss']:.4f}  {sparkline(list(self._losses))}")
        if self._held_out:
            table.add_row("held-out loss", self._held_out)
        table.add_row(
            "grad norm, lr", f"{metrics.get('train/grad_norm', 0):.3f}, {metrics.get('train/lr', 0):.2e}"
        )
        speed = f"{metrics.get('perf/tokens_per_s', 0):,.0f} tokens/s"
        if "perf/mfu" in metrics:
            speed += f", MFU {100 * metrics['perf/mfu']:.1f} %"
        table.add_row("speed", speed)
        table.add_row("memory", f"{metrics.get('mem/max_allocated_gib', 0):.2f} GiB peak")
        if "balance/compute_max_over_mean" in metrics:
            table.add_row("balance", f"{metrics['balance/compute_max_over_mean']:.2f} slowest over mean")
        if metrics.get("train/skipped_steps"):
            table.add_row("skipped", f"{metrics['train/skipped_steps']:.0f} steps", style="bold red")
        return Panel(table, title=self.title, border_style="cyan")

    def close(self) -> None:
        self._live.stop()


def make_console(kind: str, total: int, title: str) -> PlainConsole | LiveConsole | None:
    """The console of the main process: `auto` is live on a terminal and plain otherwise."""
    if kind == "quiet":
        return None
    if kind == "live" or (kind == "auto" and sys.stdout.isatty()):
        return LiveConsole(total, title)
    return PlainConsole(total)
