"""A failed start asks the doctor by itself: what it finds on this machine that explains the error is shown last.

The doctor runs in a process of its own, under a time limit: whatever it meets, the failure is told all the same.
Where no symptom matches the error, nothing is started and nothing said.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from types import TracebackType

from commons.doctor.diagnosis import matching_symptoms
from commons.lifecycle.job import read_job
from commons.lifecycle.suite_root import SUITE_ROOT

EXPLAIN_SECONDS = 40.0  # torch may have to be imported, on a machine that is in trouble
LONGEST_MESSAGE = 4000
LAUNCHER_RUN_ID = "run_gemini"  # of torchrun's engine, under commons.launch
DOCTOR = str(SUITE_ROOT / "commons" / "doctor")  # by its path: a module's name is looked up in the current folder first


def needs_no_traceback(message: str) -> bool:
    """Whether the machine is at fault, not the code: where the error was raised then tells nothing."""
    return any(not symptom.shows_code for symptom in matching_symptoms(message))


def explanation(message: str, seconds: float = EXPLAIN_SECONDS) -> str:
    """The findings that may have caused this error, as text; empty where there are none, or not in time."""
    if not matching_symptoms(message):
        return ""
    command = [sys.executable, DOCTOR, "--failure", message[-LONGEST_MESSAGE:].replace("\0", "")]
    try:
        doctor = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # with the processes that it starts, which end with it
        )
    except (OSError, ValueError):
        return ""
    try:
        return doctor.communicate(timeout=seconds)[0].decode(errors="replace").rstrip()
    except subprocess.TimeoutExpired:
        return ""
    finally:
        with contextlib.suppress(OSError):
            os.killpg(doctor.pid, signal.SIGKILL)
        doctor.wait()


def explain_uncaught() -> None:
    """From here on an exception that ends this process is explained: under plain torchrun or python by the
    process itself, under commons.launch by that, once for all ranks."""
    sys.excepthook = _show


def _show(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    message = f"{kind.__name__}: {error}"
    plain, told_by_launcher = needs_no_traceback(message), _under_launcher()
    if plain:
        print(message, file=sys.stderr, flush=True)
    else:
        traceback.print_exception(kind, error, frames)
    if told_by_launcher or not issubclass(kind, Exception) or read_job().local_rank != 0:
        return  # every rank of a machine would say the same
    causes = explanation(message)
    if causes:
        print(f"\n{causes}", file=sys.stderr, flush=True)
    elif plain:
        traceback.print_exception(kind, error, frames)


def _under_launcher() -> bool:
    return read_job().run_id == LAUNCHER_RUN_ID
