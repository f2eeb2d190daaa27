"""The progress bar below the lines of a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBar:
    """Steps done and the time left. OSError when the terminal has gone."""

    def __init__(self, console: Console, total_steps: int) -> None:
        # No refresh thread: it would take the interpreter's lock from the step that is being timed.
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps)

    def start(self) -> None:
        self._progress.start()
        self._progress.refresh()

    def advance(self, step: int) -> None:
        """``step`` is done."""
        self._progress.update(self._task, completed=step, refresh=True)

    def stop(self) -> None:
        """Take the bar away; harmless when called again."""
        # Emptied first: rich ends the bar's line and then goes back up, which a log file cannot.
        self._progress.update(self._task, visible=False)
        self._progress.stop()
