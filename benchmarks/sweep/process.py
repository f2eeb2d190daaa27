"""One run as a process of its own: started, timed, ended when it takes too long or when the sweep ends."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from benchmarks.sweep.runs import FINISHED, Run, state_of
from commons.cli.variables import FLAG_VARIABLES
from commons.lifecycle.suite_root import SUITE_ROOT
from commons.reporting.writing import write_json

# the launcher's own, which no cell takes from the user
JOB_VARIABLES = ("GPUNUM", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER = SUITE_ROOT / "commons" / "launch"
POLL_SECONDS = 0.1
END_SECONDS = 40  # between asking the launcher to end and killing it; it gives its ranks a part of that
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """What the sweep saw of a run.

    Attributes:
        exit_code: the launcher's.
        seconds: from its start to its end.
        first_step_seconds: from its start until the first step was logged; None if none was.
        timed_out: whether the sweep ended it.
    """

    exit_code: int
    seconds: float
    first_step_seconds: float | None
    timed_out: bool


def perform(run: Run, extra_flags: Sequence[str], seconds: float) -> str | None:
    """Do the run and record what became of it; how it ended, as Run.state() says. What an earlier sweep left of the
    same run is removed.
    """
    _wait_until_free(run.folder)
    shutil.rmtree(run.folder, ignore_errors=True)
    run.record.unlink(missing_ok=True)
    words = ["--log_dir", str(run.cell_folder), "--run_name", run.name, *run.cell.flags, *extra_flags]
    command = [sys.executable, str(LAUNCHER), *words]
    with run.console.open("w") as console, _process(command, environment_of(run, os.environ), console) as process:
        outcome = _wait(process, run.folder / "metrics.jsonl", seconds)
    write_json(run.record, outcome)
    state = state_of(run.summary(), {"timed_out": outcome.timed_out, "exit_code": outcome.exit_code})
    if state == FINISHED:
        run.console.unlink()  # the run's folder has its console.log
    return state


def _wait_until_free(folder: Path) -> None:
    """Until the run that an earlier sweep left behind has ended: its launcher holds a lock on the folder. At most
    END_SECONDS.
    """
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        deadline = time.monotonic() + END_SECONDS
        try:
            while time.monotonic() < deadline:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                time.sleep(POLL_SECONDS)
        finally:
            os.close(lock)


def environment_of(run: Run, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of a run: the user's own that stand for settings must not change a cell."""
    kept = {name: value for name, value in environ.items() if name not in (*FLAG_VARIABLES, *JOB_VARIABLES)}
    kept["GPUNUM"] = str(run.cell.gpus)
    if run.cell.visible is not None:
        kept["CUDA_VISIBLE_DEVICES"] = run.cell.visible
    return kept


@contextlib.contextmanager
def _process(command: list[str], environ: Mapping[str, str], console: TextIO) -> Iterator[subprocess.Popen]:
    """The launcher, which does not outlive the block, nor this process however that ends."""
    process = subprocess.Popen(
        command,
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=subprocess.STDOUT,
        preexec_fn=_end_with_parent,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # the launcher ends its ranks
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(process: subprocess.Popen, metrics: Path, seconds: float) -> Outcome:
    """Until the process has ended, or has been told to for the time that it takes."""
    start, first_step_seconds, timed_out = time.monotonic(), None, False
    while process.poll() is None:
        now = time.monotonic() - start
        if first_step_seconds is None and metrics.exists() and metrics.stat().st_size:
            first_step_seconds = now
        if now > seconds:
            timed_out = True
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            process.wait()
        time.sleep(POLL_SECONDS)
    return Outcome(process.returncode, time.monotonic() - start, first_step_seconds, timed_out)
