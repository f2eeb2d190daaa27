"""Standard input, output and error: of a process that was started without them (``>&-``), and of one whose reader has
gone (``| head``).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def quiet_without_reader() -> Iterator[None]:
    """A process whose work is to print ends here, with the code of a program that SIGPIPE ended, once nobody reads any
    more. Python would say so at the exit, where nothing can be done about it.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        sys.exit(128 + signal.SIGPIPE)
