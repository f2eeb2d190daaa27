"""Standard input, output and error, also where a process was started without them (`>&-`)."""

from __future__ import annotations

import os
import sys


def open_closed_streams() -> None:
    """Let those of this process's standard streams that are closed lead to nowhere: else the next file that is opened
    takes the number of one of them, and gets what others print. Call it before anything is opened.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(_open_as(number), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def _open_as(number: int) -> int:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != number:
        os.dup2(opened, number)
        os.close(opened)
    return number
