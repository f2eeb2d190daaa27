"""A run's folder belongs to one run: it is claimed before anything is written into it.

A default name is claimed by making its folder, which only one of several processes can do, on a network's file system
too. A name that the user gave may be that of an earlier run, whose files the new one replaces, but not of one that goes
on: its launcher, or its rank 0 where there is none, holds a lock that the kernel takes back however the process ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import os
from pathlib import Path

from commons.config.resolved import ResolvedConfig
from commons.lifecycle.guard import WATCH_VARIABLE
from commons.lifecycle.outcome import RunError
from commons.reporting.writing import writing

_held: list[int] = []  # open as long as this process lives


class FolderInUse(RunError):
    """Another run, which goes on, writes into the folder."""

    exit_code = 2

    def __init__(self, folder: Path) -> None:
        super().__init__(f"{folder} is in use by a run that is still going: choose another --run_name, or omit it")


def claim_folder(config: ResolvedConfig) -> ResolvedConfig:
    """Make the run's folder and keep it until this process ends; returns ``config`` with the folder's name.

    Raises:
        FolderInUse: the name was given, and another run holds it.
        OSError: the folder cannot be made.
    """
    if config.asked("run_name"):
        config.run_dir.mkdir(parents=True, exist_ok=True)
        if not lock_folder(config.run_dir):
            raise FolderInUse(config.run_dir)
        return config
    name = config.run_name
    for number in itertools.count(1):
        named = dataclasses.replace(config, run_name=name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            named.run_dir.mkdir(parents=True)
            lock_folder(named.run_dir)
            return named
    raise AssertionError("there is always a next number")


def with_own_folder(config: ResolvedConfig, rank: int) -> ResolvedConfig:
    """For a rank: ``config`` with a folder that rank 0 has claimed, unless the launcher did; the others' name may still
    be another. Raises FolderInUse and SinkError.
    """
    if rank != 0 or WATCH_VARIABLE in os.environ:
        return config
    with writing(config.log_dir):
        return claim_folder(config)


def lock_folder(folder: Path) -> bool:
    """Whether the folder is this process's now: the folder itself is locked, no file is added. A file system that knows
    no such locks (NFS) refuses nobody.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    _held.append(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(_held.pop())
        return False
    except OSError:
        pass
    return True
