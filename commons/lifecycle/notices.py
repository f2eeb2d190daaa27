"""Lines for the user, told once a job."""

from __future__ import annotations

import sys

from commons.lifecycle.job import read_job


def say(line: str) -> None:
    """Tell the user, once a job."""
    if read_job().rank == 0:
        print(line, file=sys.stderr, flush=True)
