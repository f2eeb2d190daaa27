"""The command: reads a sweep, runs what is not done yet, the repeats in turn, and says how it went."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.sweep.cell import Cell, Machine
from benchmarks.sweep.grid import OWN_FLAGS, Sweep, SweepError, find_sweep, read_sweep, ready_made
from benchmarks.sweep.limits import forecast_kinds, free_room, reason_to_skip
from benchmarks.sweep.process import perform
from benchmarks.sweep.progress import SweepProgress, duration
from benchmarks.sweep.runs import FINISHED, OUT_OF_MEMORY, Run, read_json, write_cell
from commons.cli.flags import CONFIG_ERROR, find_devices, read_flags
from commons.lifecycle.caches import settle_caches
from commons.lifecycle.suite_root import SUITE_ROOT
from commons.reporting.environment import git_state, stated_commit
from commons.reporting.writing import write_json

DESCRIPTION = """Runs every cell of a sweep in a process of its own, the repeats in turn.

    python -m benchmarks.sweep quick --out my_sweep       a ready-made sweep, or a file that ends in .toml
    python -m benchmarks.sweep --list                     the ready-made ones
    python -m benchmarks.sweep plans --out my_plans --train_step 40    further flags are those of a training

Started again with the same --out it repeats no run that is done. `python -m benchmarks.report OUT` makes the page.
Exit code: 0 when every run finished, ran out of memory or was skipped; 1 when one failed or is still to be done;
2 for a sweep that cannot be read; 128 + n after signal n."""
# of an extra run: it is not timed, so it is short
EXTRA_FLAGS = {
    "parity": ("--train_step", "5", "--warmup_step", "1", "--check_parity", "true"),
    "trace": ("--train_step", "8", "--warmup_step", "4", "--trace_step", "7"),
}


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments, words = parser.parse_known_args(list(argv))
    if arguments.list:
        print("\n".join(f"{name:12}{_about(path)}" for name, path in ready_made().items()))
        return 0
    settle_caches()
    machine = Machine(*find_devices("auto"))
    if arguments.devices:
        machine = Machine(machine.device_type, arguments.devices)
    name = arguments.sweep or ("example" if machine.device_type == "cuda" else "quick")
    out = arguments.out or Path("gemini_sweeps") / Path(name).stem
    try:
        sweep = _read(name, machine, words, arguments)
        if arguments.dry_run:
            _show(sweep, machine)
            return 0
        machine = dataclasses.replace(machine, room=free_room(machine.device_type, machine.ranks))
        with _stopping(), _own(out):
            return Work(sweep, machine, out, arguments.retry, argv).run()
    except SweepError as error:
        print("\n".join(f"benchmarks.sweep: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return CONFIG_ERROR
    except Stopped as stopped:
        print(f"stopped by {stopped.name}; the same command goes on from here", file=sys.stderr)
        return stopped.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks.sweep",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "sweep", nargs="?", help="a name of --list or a TOML file (default: example, or quick on a CPU)"
    )
    parser.add_argument("--out", type=Path, help="folder for the runs (default: gemini_sweeps/NAME)")
    parser.add_argument("--repeats", type=int, help="runs of each cell, instead of the file's number")
    parser.add_argument("--minutes", type=float, help="the budget, instead of the file's")
    parser.add_argument("--devices", type=int, help='ranks that "all" stands for (default: the visible GPUs)')
    parser.add_argument("--only", type=re.compile, help="cells whose label this finds (a regular expression)")
    parser.add_argument("--retry", action="store_true", help="run again what failed or took too long")
    parser.add_argument("--dry_run", action="store_true", help="print the cells, and which would be skipped, and end")
    parser.add_argument("--list", action="store_true", help="print the ready-made sweeps and end")
    return parser


def _about(path: Path) -> str:
    return re.search(r'^about = "(.*)"$', path.read_text(), re.MULTILINE)[1]  # pyright: ignore[reportOptionalSubscript]


def _read(name: str, machine: Machine, words: Sequence[str], arguments: argparse.Namespace) -> Sweep:
    line = read_flags(words)
    found = [*line.problems, *(f"--{flag}: the sweep sets it itself" for flag in line.given if flag in OWN_FLAGS)]
    if found:
        raise SweepError("\n".join(found))
    sweep = read_sweep(find_sweep(name), machine, line.given)
    cells = [cell for cell in sweep.cells if not arguments.only or arguments.only.search(cell.label)]
    if not cells:
        raise SweepError(f"--only {arguments.only.pattern!r} leaves no cell of {sweep.name}: see --dry_run")
    cells.sort(key=lambda cell: cell.load(machine))  # what is larger than one that did not fit is skipped
    changes = {"repeats": arguments.repeats, "minutes": arguments.minutes}
    for flag, value in changes.items():
        if value is not None and value <= 0:
            raise SweepError(f"--{flag} must be above 0, got {value:g}")
    given = {flag: value for flag, value in changes.items() if value is not None}
    kept = {name: getattr(sweep, name) for name in ("name", "about", "repeats", "minutes", "run_seconds", "extra")}
    return Sweep(**{**kept, **given, "cells": tuple(cells)})


def _show(sweep: Sweep, machine: Machine) -> None:
    for cell in sweep.cells:
        print(f"{cell.label}: {reason_to_skip(cell, machine) or shlex.join(cell.flags)}")
    print(f"{len(sweep.cells)} cells × {sweep.repeats} repeats, {' and '.join(sweep.extra) or 'no'} extra runs")


@dataclass
class Work:
    """A sweep being worked through."""

    sweep: Sweep
    machine: Machine
    out: Path
    retry: bool
    argv: Sequence[str]
    skipped: dict[str, str] = field(default_factory=dict)  # cell id -> why
    start: float = field(default_factory=time.monotonic)

    def run(self) -> int:
        """All runs, the repeats in turn; the exit code."""
        self._write_head()
        for cell in self.sweep.cells:
            self._judge(cell)
        runs = list(self._runs())
        ready = [run for run in runs if run.cell.id not in self.skipped]
        done = sum(self._is_done(run) for run in ready)
        with SweepProgress(len(ready), done) as progress:
            for cell in self.sweep.cells:
                if cell.id in self.skipped:
                    progress.say(f"skipped: {cell.label}: {self.skipped[cell.id]}")
            self._work_off(ready, progress)
            return self._conclude(runs, progress)

    def _runs(self) -> Iterator[Run]:
        """In turn: every cell once, then its extra runs, then every cell again."""
        repeats = [f"run-{number + 1}" for number in range(self.sweep.repeats)]
        for name in (repeats[0], *self.sweep.extra, *repeats[1:]):
            for cell in self.sweep.cells:
                yield Run(cell, name, self.out)

    def _work_off(self, runs: Sequence[Run], progress: SweepProgress) -> None:
        for run in runs:
            if run.cell.id in self.skipped or self._is_done(run) or self._given_up(run):
                continue
            if self._over_budget(progress.typical_seconds):
                progress.say(f"the budget of {self.sweep.minutes:g} minutes is used up: the same command goes on")
                return
            progress.running(f"{run.cell.label} {run.name}")
            begin = time.monotonic()
            state = perform(run, EXTRA_FLAGS.get(run.name, ()), self.sweep.run_seconds)
            progress.done(f"{run.cell.label} {run.name}", state, run.summary(), time.monotonic() - begin)
            if state == OUT_OF_MEMORY:
                self._skip_larger(progress)
            elif state == FINISHED and self.machine.device_type == "cuda":
                write_json(run.folder / "forecast.json", {"kinds_mib": forecast_kinds(run.cell, self.machine)})

    def _is_done(self, run: Run) -> bool:
        state = run.state()
        return state in (FINISHED, OUT_OF_MEMORY) or (state is not None and not self.retry)

    def _given_up(self, run: Run) -> bool:
        """Whether the cell's first run shows that another one is of no use."""
        return Run(run.cell, "run-1", self.out).state() not in (None, FINISHED)

    def _over_budget(self, seconds: float) -> bool:
        """Whether a run that takes so long would end after the budget."""
        limit = self.sweep.minutes
        return limit is not None and time.monotonic() - self.start + seconds > limit * 60

    def _judge(self, cell: Cell) -> None:
        """Write the cell's record, with why it is skipped if it is. What has run needs no forecast."""
        first = Run(cell, "run-1", self.out).state()
        why = None if first else reason_to_skip(cell, self.machine, self._out_of_memory())
        if why:
            self.skipped[cell.id] = why
        write_cell(cell, self.out, why)

    def _out_of_memory(self) -> list[Cell]:
        return [cell for cell in self.sweep.cells if Run(cell, "run-1", self.out).state() == OUT_OF_MEMORY]

    def _skip_larger(self, progress: SweepProgress) -> None:
        for cell in self.sweep.cells:
            if cell.id not in self.skipped:
                self._judge(cell)
                if cell.id in self.skipped:
                    progress.skip(self.sweep.repeats + len(self.sweep.extra))
                    progress.say(f"skipped: {cell.label}: {self.skipped[cell.id]}")

    def _write_head(self) -> None:
        head = {
            "name": self.sweep.name,
            "about": self.sweep.about,
            "command": shlex.join(["python", "-m", "benchmarks.sweep", *self.argv]),
            "commit": git_state(SUITE_ROOT)[0] or stated_commit(os.environ),
            "repeats": self.sweep.repeats,
            "extra": list(self.sweep.extra),
            "cells": [cell.id for cell in self.sweep.cells],
        }
        write_json(self.out / "sweep.json", head)

    def _conclude(self, runs: Sequence[Run], progress: SweepProgress) -> int:
        states = [run.state() for run in runs if run.cell.id not in self.skipped and not self._given_up(run)]
        bad = [cell for cell in self.sweep.cells if self._went_wrong(cell)]
        for cell in bad:
            run = Run(cell, "run-1", self.out)
            progress.say(f"{run.state()}: {cell.label}: see {run.console}")
        left = states.count(None)
        took = duration(time.monotonic() - self.start)
        progress.say(
            f"{states.count(FINISHED)} runs finished, {len(self._out_of_memory())} cells out of memory,"
            f" {len(bad)} failed, {len(self.skipped)} skipped, {left} runs left, {took}"
        )
        if saved := self._saved_seconds(progress.typical_seconds):
            progress.say(f"the skipped cells would have taken about {duration(saved)} (an estimate)")
        progress.say(f"python -m benchmarks.report {shlex.quote(str(self.out))}")
        return 1 if bad or left else 0

    def _went_wrong(self, cell: Cell) -> bool:
        return Run(cell, "run-1", self.out).state() not in (None, FINISHED, OUT_OF_MEMORY)

    def _saved_seconds(self, typical_seconds: float) -> float:
        """What cells that cannot fit would have taken to run out: one run each, as long as those that did, or as a run
        of this start.
        """
        took = [read_json(Run(cell, "run-1", self.out).record).get("seconds", 0.0) for cell in self._out_of_memory()]
        each = sum(took) / len(took) if took else typical_seconds
        return each * sum(not why.startswith("refused") for why in self.skipped.values())


# ---- the end of it all


class Stopped(BaseException):
    """A signal asks for the end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.name, self.exit_code = signal.Signals(signum).name, 128 + signum


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Ctrl-C and the like end the run that is on, and then the sweep."""

    def stop(signum: int, frame: object) -> None:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)  # the run is ending already
        raise Stopped(signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
    yield


@contextlib.contextmanager
def _own(out: Path) -> Iterator[None]:
    """``out`` is this sweep's while it runs. SweepError where it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise SweepError(f"--out {out}: {error.strerror}: choose a folder that can be written to") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SweepError(
            f"--out {out}: another sweep is at work there: wait for it, or choose another folder"
        ) from None
    except OSError:
        pass  # a file system without locks (NFS) refuses nobody
    yield
    os.close(lock)
