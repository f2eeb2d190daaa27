"""Where the suite lies, and how another process finds it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

SUITE_ROOT = Path(__file__).resolve().parents[2]


def python_path(environ: Mapping[str, str]) -> str:
    """PYTHONPATH for a child process: the suite, and behind it what the variable has already, as packages may lie
    there.
    """
    return os.pathsep.join([str(SUITE_ROOT), *filter(None, [environ.get("PYTHONPATH")])])
