"""Standard input, output and error of a process that was started without them (``>&-``)."""

from __future__ import annotations

import os
import sys


def open_missing_streams() -> None:
    """Let whatever of the three is closed lead nowhere.

    Python has None in their place, which print() bears and hardly any library; and the next file that is opened would
    get the number of standard output, and with it all that C code prints.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            os.set_inheritable(nowhere, True)
            assert nowhere == fd
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
