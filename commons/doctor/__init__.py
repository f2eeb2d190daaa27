"""Says why this machine cannot train, or that it can: `python -m commons.doctor [--json]`.

Standard library alone, so that it works before anything is installed; torch is only ever imported in a child
process. The parts, each importing only those above it:

    findings.py    Finding: level, what was seen, why it matters, the cure as a command
    probes.py      what runs in child processes: loading libcuda, importing torch, a two-process all-reduce
    processes.py   child processes with a time limit
    machine.py     Machine: every question that a check may ask of the computer (tests fake it)
    smi.py         nvidia-smi's answers as records
    driver.py libcuda.py torch_build.py gpu_state.py packages.py network.py host.py    the checks
    diagnosis.py   CHECKS, the one table of them; diagnose(), explain_no_gpu(), explain_failure(), ...
    report.py      findings as text and as JSON
    failure.py     a failed start asks by itself

This file keeps to what a very old Python can parse, so that such a one says a sentence, not SyntaxError.
"""

import sys

OLDEST_PYTHON = (3, 10)

if sys.version_info < OLDEST_PYTHON:
    from commons.doctor.old_python import refusal

    raise SystemExit(refusal(OLDEST_PYTHON))

from commons.doctor.diagnosis import (  # noqa: E402  (older Pythons must not get this far)
    CHECKS,
    diagnose,
    explain_failure,
    explain_no_gpu,
    why_no_gpu,
)
from commons.doctor.failure import explain_uncaught, explanation, needs_no_traceback  # noqa: E402
from commons.doctor.findings import Finding, exit_code  # noqa: E402
from commons.doctor.machine import Machine  # noqa: E402
from commons.doctor.report import as_json, as_text  # noqa: E402

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
