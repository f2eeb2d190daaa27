"""Lines for the user, told once a job."""

from __future__ import annotations

import os
import sys


def say(line: str) -> None:
    """Tell the user, once a job."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
