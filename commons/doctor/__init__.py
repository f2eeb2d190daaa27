"""Says why this machine cannot train, or that it can: `python -m commons.doctor [--json]`.

May import: lifecycle, and of the libraries the standard one alone, so that it works before anything is installed;
torch is only ever imported in a child process.
May not: every other room.

Its modules, each importing only those above it:

    findings.py    Finding: level, what was seen, why it matters, the cure as a command
    probes.py      what runs in child processes: loading libcuda, importing torch, asking for the machine's address
    processes.py   child processes with a time limit
    machine.py     Machine: every question that a check may ask of the computer (tests fake it)
    smi.py         nvidia-smi's answers as records
    driver.py visible_devices.py libcuda.py torch_build.py gpu_state.py packages.py network.py host.py    the checks
    diagnosis.py   CHECKS, the one table of them; diagnose(), explain_no_gpu(), explain_failure(), ...
    report.py      findings as text and as JSON
    failure.py     a failed start asks by itself
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036  (such a Python cannot read the modules below)
    raise SystemExit("error: this suite needs Python 3.10 or newer; this is Python " + sys.version.split()[0])

from commons.doctor.diagnosis import (
    CHECKS,
    diagnose,
    explain_failure,
    explain_no_gpu,
    why_no_gpu,
)
from commons.doctor.failure import explain_uncaught, explanation, needs_no_traceback
from commons.doctor.findings import Finding, exit_code
from commons.doctor.machine import Machine
from commons.doctor.report import as_json, as_text

__all__ = [
    "CHECKS",
    "Finding",
    "Machine",
    "as_json",
    "as_text",
    "diagnose",
    "exit_code",
    "explain_failure",
    "explain_no_gpu",
    "explain_uncaught",
    "explanation",
    "needs_no_traceback",
    "why_no_gpu",
]
