"""The CPU's model name, for the header of a run and its environment file."""

from __future__ import annotations

import platform
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# x86 says "model name"; Arm boards and older kernels "Model" or "Hardware", where they say anything
NAME = re.compile(r"^(?:model name|Model|Hardware)[ \t]*:[ \t]*(\S.*)$", re.MULTILINE)


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """The model's name in /proc/cpuinfo, else what the platform module knows; may be empty, where nothing does."""
    try:
        found = NAME.search(cpuinfo.read_text(errors="replace"))
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
