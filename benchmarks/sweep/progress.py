"""What a sweep shows while it runs: a line per run, and on a terminal a bar with the time left."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.sweep.runs import FINISHED


class SweepProgress:
    """Counts runs and tells how long the rest will take, from those that ran in this start."""

    def __init__(self, total: int, done: int) -> None:
        on_terminal = sys.stdout.isatty()
        self._console = Console(
            highlight=False, markup=False, emoji=False, soft_wrap=True, width=None if on_terminal else 200
        )
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("ETA {task.fields[eta]}"),
        )  # fmt: skip
        # one refresh per second: the cells are being timed on the same machine
        self._bar = Progress(
            *columns, console=self._console, transient=True, refresh_per_second=1, disable=not on_terminal
        )
        self._task = self._bar.add_task("sweep", total=total, completed=done, eta="-")
        self._total, self._done, self._seconds = total, done, []

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text)

    @property
    def typical_seconds(self) -> float:
        """Of one run, from those seen; 0 before the first."""
        return sum(self._seconds) / len(self._seconds) if self._seconds else 0.0

    def skip(self, runs: int) -> None:
        """So many runs will not take place."""
        self._total -= runs
        self._bar.update(self._task, total=self._total)

    def running(self, label: str) -> None:
        self._bar.update(self._task, description=label)

    def done(self, label: str, state: str | None, summary: Mapping[str, Any], seconds: float) -> None:
        self._done += 1
        self._seconds.append(seconds)
        eta = duration((self._total - self._done) * self.typical_seconds)
        self._bar.update(self._task, completed=self._done, eta=eta)
        self.say(f"[{self._done}/{self._total}] {label}: {describe(state, summary)} ({seconds:.0f} s, ETA {eta})")


def describe(state: str | None, summary: Mapping[str, Any]) -> str:
    """How a run ended, with its speed or the reason."""
    step = (summary.get("step_seconds") or {}).get("median")
    if state == FINISHED:
        rate = (summary.get("model_tflops_per_device") or {}).get("median")
        return (
            state if step is None or rate is None else f"{step * 1e3:.4g} ms a step, {rate:.4g} model TFLOPS per device"
        )
    because = " ".join(str(summary.get("ended_because") or "").split())
    return f"{state}: {because[:160]}" if because else str(state)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
