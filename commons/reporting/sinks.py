"""Where a run's records go: the console, metrics.jsonl, summary.json, config.json and env.json.

Sinks run on rank 0 only and outside the clocks of a step. The training loop knows none of them, and they know
no model: they take StepRecords, a header of plain values and the summary's dict. A new sink is a class with
log(), report() and close(), and one line in make_sinks().
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from commons.lifecycle.outcome import RunError
from commons.reporting.console_layout import Header, StepLines, header_lines, summary_lines
from commons.reporting.environment import describe_environment

if TYPE_CHECKING:
    from commons.reporting.record import StepRecord

PLAIN_WIDTH = 120  # columns of text in a pipe or a file, where no window says how many there are
CONSOLE = "the console (standard output)"


class Sink(Protocol):
    """Takes what a run has to tell. Every method may raise SinkError."""

    def log(self, record: StepRecord) -> None:
        """Take the record of one step."""
        ...

    def report(self, summary: Mapping[str, Any]) -> None:
        """Take the summary, once, at the end or when the run is cut short."""
        ...

    def close(self) -> None:
        """Release what is held; harmless when called again."""
        ...


# --- Failing to write -----------------------------------------------------------------------------

CURES = {
    errno.ENOSPC: "free some space there, or choose another disk with --log_dir",
    errno.EDQUOT: "free some of your quota, or choose another disk with --log_dir",
    errno.EACCES: "choose a folder you may write to with --log_dir",
    errno.EPERM: "choose a folder you may write to with --log_dir",
    errno.EROFS: "choose a folder you may write to with --log_dir",
    errno.EPIPE: "whatever read the output has ended: keep it open, or send the output to a file",
}
OTHER_CURE = "check the disk, or choose another folder with --log_dir"


class SinkError(OSError, RunError):
    """Something could not be written. Its text is one line: the file, why, and what to do about it."""

    def __str__(self) -> str:
        return self.strerror or ""  # OSError would put "[Errno 28]" before it


@contextlib.contextmanager
def writing(name: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError inside the block into a SinkError about the file `name`."""
    try:
        yield
    except SinkError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        cure = CURES.get(error.errno or 0, OTHER_CURE)
        raise SinkError(error.errno, f"cannot write {os.fspath(name)}: {reason}; {cure}") from None


# --- JSON files -----------------------------------------------------------------------------------


def json_ready(value: Any, path: str, non_finite: dict[str, str]) -> Any:
    """A copy of `value` that strict JSON can hold: NaN and infinities become None.

    Args:
        value: anything of dataclasses, dicts, sequences, numbers, strings, numpy or torch scalars, and paths.
        path: where `value` lies in the whole, in dots.
        non_finite: is given {path: "nan", "inf" or "-inf"} for every number that JSON has no word for.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    scalar = getattr(value, "item", None)  # of numpy or torch
    if callable(scalar):
        value = scalar()
    if isinstance(value, float) and not math.isfinite(value):
        non_finite[path] = str(value)
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # a path that is no valid text holds lone surrogates
    if value is None or isinstance(value, (bool, int, float)):
        return value
    prefix = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item, f"{prefix}{key}", non_finite) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [json_ready(item, f"{prefix}{index}", non_finite) for index, item in enumerate(value)]
    return json_ready(str(value), path, non_finite)


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON of a dict or dataclass; what was NaN or infinite is null and named under "non_finite"."""
    non_finite: dict[str, str] = {}
    ready = json_ready(value, "", non_finite)
    if non_finite:
        ready["non_finite"] = non_finite
    return json.dumps(ready, indent=indent, allow_nan=False, ensure_ascii=False)


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` whole or not at all: a reader never sees half a file. Raises SinkError."""
    text = to_json(value, indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


class JsonlSink:
    """metrics.jsonl: a JSON object a step, its keys the fields of StepRecord.

    When log() returns, the line is with the kernel: killing the process cannot lose it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            # Unbuffered: nothing that a kill could lose, and nothing left to fail a second time at close.
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115

    def log(self, record: StepRecord) -> None:
        line = memoryview((to_json(record) + "\n").encode())
        written = 0
        with writing(self.path):
            try:
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                self._take_back(written)
                raise

    def report(self, summary: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        with writing(self.path):
            self._file.close()

    def _take_back(self, written: int) -> None:
        # A disk that fills up takes the first part of a line; the file must keep whole lines only.
        with contextlib.suppress(OSError):
            if written:
                self._file.truncate(self._file.tell() - written)


class SummarySink:
    """summary.json, written whole when the run reports."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, record: StepRecord) -> None:
        pass

    def report(self, summary: Mapping[str, Any]) -> None:
        write_json(self.path, summary)

    def close(self) -> None:
        pass


# --- The console ----------------------------------------------------------------------------------

ASCII = str.maketrans({"×": "x", "·": "-"})


class _Screen(Console):
    """A rich console that never hides the cursor: a killed run must not leave a terminal without one."""

    def show_cursor(self, show: bool = True) -> bool:
        return False

    def on_broken_pipe(self) -> None:
        # rich would exit here and now; the sinks are to be closed and the user told first.
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def make_console(file: IO[str]) -> Console:
    """Colours on a terminal (unless NO_COLOR is set), plain text in a pipe or a file."""
    on_terminal = file.isatty()
    return _Screen(
        file=file,
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
    """Header, a line a step and the table at the end.

    Args:
        console: where to; see make_console().
        name: what `console` is called in an error.
        step_lines: the layout of the lines, or None for no step lines.
        close_file: whether close() closes the console's file.
    """

    def __init__(self, console: Console, name: str, step_lines: StepLines | None, close_file: bool = False) -> None:
        self._console, self._name, self._step_lines = console, name, step_lines
        self._close_file = close_file

    def start(self, header: Header, run_dir: str) -> None:
        """Print the header."""
        self._print(header_lines(header, run_dir))

    def log(self, record: StepRecord) -> None:
        if self._step_lines is not None:
            self._print(self._step_lines.lines(record, self._console.width))

    def report(self, summary: Mapping[str, Any]) -> None:
        self._print(summary_lines(summary))

    def close(self) -> None:
        if self._close_file:
            with writing(self._name):
                self._console.file.close()

    def _print(self, lines: list[Text]) -> None:
        with writing(self._name):
            try:
                for line in lines:
                    print_line(self._console, line)
            except OSError:
                _discard_buffer(self._console.file)
                raise


def _discard_buffer(file: IO[str]) -> None:
    # What could not be written stays in the buffer and would fail again when the file is closed: at the exit
    # of the interpreter that is a second, confusing error and exit code 120.
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file.fileno())
        os.close(nowhere)


class ProgressSink:
    """A progress bar with the time left, below the lines; for terminals only. It goes when the run ends."""

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
        """Show the bar."""
        with writing(CONSOLE):
            self._progress.start()
            self._progress.refresh()

    def log(self, record: StepRecord) -> None:
        with writing(CONSOLE):
            self._progress.update(self._task, completed=record.step, refresh=True)

    def report(self, summary: Mapping[str, Any]) -> None:
        self.close()

    def close(self) -> None:
        with writing(CONSOLE):
            # Emptied first: rich ends the bar's line and then goes back up, which a log file cannot.
            self._progress.update(self._task, visible=False)
            self._progress.stop()


# --- All of them ----------------------------------------------------------------------------------


def start_run_folder(run_dir: Path, config: Any, environment: Mapping[str, Any]) -> None:
    """Make the run's folder with config.json and env.json. Raises SinkError."""
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    write_json(run_dir / "config.json", config)
    write_json(run_dir / "env.json", environment)


def make_sinks(run_dir: str | Path, config: Any, header: Header) -> list[Sink]:
    """Start the run's folder, open every sink and print the header; on rank 0 only.

    Args:
        run_dir: the run's folder, made where it does not exist yet.
        config: the TrainConfig; train_step, warmup_step and quiet are read, all of it goes to config.json.
        header: what the console's header shows.

    Raises:
        SinkError: something could not be written; its text is one line that says what to do.
    """
    run_dir = Path(run_dir)
    start_run_folder(run_dir, config, describe_environment(header.get("device_name")))
    # The files first: a step is on the disk before it is on the screen.
    sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl"), SummarySink(run_dir / "summary.json")]
    if not (run_dir / "console.log").exists():  # else the launcher is keeping it, with all ranks' words
        sinks.append(_console_copy(run_dir / "console.log", config, header, str(run_dir)))
    console = make_console(sys.stdout)
    lines = ConsoleSink(console, CONSOLE, _step_lines(config, header))
    lines.start(header, str(run_dir))
    if console.is_interactive:
        bar = ProgressSink(console, config.train_step)
        bar.start()
        sinks.append(bar)  # before the lines: it must be gone before the table at the end
    return [*sinks, lines]


@contextlib.contextmanager
def open_sinks(config: Any, header: Header, rank: int) -> Iterator[list[Sink]]:
    """The sinks of a run (see make_sinks), closed at the end of the block; none on ranks other than 0."""
    if rank != 0:
        yield []
        return
    sinks = make_sinks(config.run_dir, config, header)
    with contextlib.ExitStack() as closing:
        for sink in sinks:
            closing.callback(sink.close)
        yield sinks


def _step_lines(config: Any, header: Header) -> StepLines | None:
    if config.quiet:
        return None
    return StepLines(config.train_step, config.warmup_step, ranks=header.get("world_size", 1))


def _console_copy(path: Path, config: Any, header: Header, run_dir: str) -> ConsoleSink:
    with writing(path):
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115
    copy = ConsoleSink(make_console(file), str(path), _step_lines(config, header), close_file=True)
    copy.start(header, run_dir)
    return copy
