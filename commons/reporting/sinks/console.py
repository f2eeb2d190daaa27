"""The console and its copy in console.log: the header, a line per step and the table at the end."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

from rich.console import Console
from rich.text import Text

from commons.reporting.console_layout import StepLines, header_lines, summary_lines
from commons.reporting.forecast import Forecast
from commons.reporting.header import RunHeader
from commons.reporting.record import StepRecord
from commons.reporting.sinks.patient_stream import PatientStream
from commons.reporting.sinks.progress_bar import ProgressBar
from commons.reporting.sinks.sink import RunFacts
from commons.reporting.writing import writing

LONG_RUN_STEPS = 100  # from here on lines say how far the training is
PLAIN_WIDTH = 120  # columns of text in a pipe or a file, where no window says how many there are
CONSOLE = "the console (standard output)"
ASCII = str.maketrans({"×": "x", "·": "-"})


class _Screen(Console):
    """A rich console that never hides the cursor: a killed run must not leave a terminal without one."""

    def show_cursor(self, show: bool = True) -> bool:
        return False

    def on_broken_pipe(self) -> None:
        # rich would exit here and now; the sinks have to be closed and the user informed first.
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def make_console(stream: PatientStream) -> Console:
    """Colours on a terminal (unless NO_COLOR is set), plain text in a pipe or a file."""
    on_terminal = stream.isatty()
    return _Screen(
        file=cast("IO[str]", stream),  # of which rich uses what PatientStream has
        # Both said outright: FORCE_COLOR and its like must not bring control characters into a pipe.
        force_terminal=on_terminal,
        force_interactive=on_terminal and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"),
        force_jupyter=False,
        width=None if on_terminal else PLAIN_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def print_line(console: Console, line: Text) -> None:
    """Print one line, unwrapped and at once (rich flushes), in characters that the file can take."""
    encoding = console.encoding
    text = line.plain if encoding.startswith("utf") else line.plain.translate(ASCII)
    line.plain = text.encode(encoding, "replace").decode(encoding)
    console.print(line, soft_wrap=True)


class ConsoleSink:
    """Header, a line per step and the table at the end.

    Args:
        console: where to; see make_console().
        name: what `console` is called in an error.
        step_lines: the layout of the lines, or None for no step lines.
        close_console: what close() has to do.
        run: how many steps there are, and which of them get a line.
    """

    def __init__(
        self,
        console: Console,
        name: str,
        step_lines: StepLines | None,
        close_console: Callable[[], object],
        run: RunFacts,
    ) -> None:
        self._console, self._name, self._step_lines = console, name, step_lines
        self._run, self._forecast = run, Forecast(run.train_step)
        self._close_console = close_console
        self._bar: ProgressBar | None = None

    def start(self, header: RunHeader, run_dir: str) -> None:
        """Print the header."""
        self._print(header_lines(header, run_dir))

    def show_bar(self, total_steps: int) -> None:
        """Keep a progress bar below the lines until the run reports."""
        self._bar = ProgressBar(self._console, total_steps)
        with writing(self._name):
            self._bar.start()

    def log(self, record: StepRecord) -> None:
        if self._bar is not None:
            with writing(self._name):
                self._bar.advance(record.step)
        seconds_left = self._forecast.seconds_left(record.step)
        if self._step_lines is not None and wants_line(record, self._run):
            self._print(self._step_lines.lines(record, self._console.width, seconds_left))

    def report(self, summary: Mapping[str, Any]) -> None:
        self._stop_bar()
        self._print(summary_lines(summary))

    def close(self) -> None:
        with writing(self._name):
            try:
                self._stop_bar()
            finally:
                self._close_console()

    def _stop_bar(self) -> None:
        if self._bar is not None:
            with writing(self._name):
                self._bar.stop()

    def _print(self, lines: list[Text]) -> None:
        with writing(self._name):
            for line in lines:
                print_line(self._console, line)


def wants_line(record: StepRecord, run: RunFacts) -> bool:
    """Whether a step gets a line: every ``log_every``-th, the first, the last, and where there is something to tell."""
    tells = record.eval_loss is not None or bool(record.nonfinite_loss_ranks)
    return tells or record.step in (1, run.train_step) or record.step % run.log_every == 0


def open_console(run: RunFacts) -> ConsoleSink | None:
    """Standard output, with a progress bar where that is a terminal; None where it was closed (``>&-``)."""
    if sys.stdout is None:
        return None
    stream = PatientStream(sys.stdout)
    console = make_console(stream)
    sink = ConsoleSink(console, CONSOLE, _step_lines(run), stream.close, run)
    sink.start(run.header, str(run.run_dir))
    if console.is_interactive:
        sink.show_bar(run.train_step)
    return sink


def open_console_log(run: RunFacts) -> ConsoleSink | None:
    """console.log; None where the launcher keeps one, with every rank's output."""
    path = run.run_dir / "console.log"
    if path.exists():
        return None
    with writing(path):
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115
    sink = ConsoleSink(make_console(PatientStream(file)), str(path), _step_lines(run), file.close, run)
    sink.start(run.header, str(run.run_dir))
    return sink


def _step_lines(run: RunFacts) -> StepLines | None:
    if run.quiet:
        return None
    progress = run.log_every > 1 or run.train_step >= LONG_RUN_STEPS or bool(run.header.data)
    return StepLines(run.train_step, run.warmup_step, ranks=run.header.world_size, progress=progress)
