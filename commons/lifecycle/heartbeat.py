"""What a rank is doing at the moment, where another process can read it: its pulse.

A rank beats at every phase of its work: a few words into a memory-mapped file, about a microsecond. The
launcher reads them (commons.launch.watch); without a launcher the rank looks at its own (commons.lifecycle.guard).
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

# What a rank can be in, in words for whoever reads that it hangs there. The order is that of a run.
RUN_PHASES = {
    "start": "its start (imports)",
    "join": "joining the process group",
    "build": "building the model",
    "wait": "waiting for the other ranks to begin",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer's step",
    "record": "gathering what the ranks saw",
    "evaluate": "evaluating on held-out data",
    "log": "writing the logs",
    "save": "saving a checkpoint",
    "parity": "training the reference (--check_parity)",
    "end": "the end of the run",
}
NAMES = tuple(RUN_PHASES)
AFTER_THE_STEPS = ("parity", "end")
LAYOUT = struct.Struct("<qqqd")  # beats, step, phase, seconds on the monotonic clock, which all processes share

START_SECONDS = 120.0  # least for imports, the model and a first step, which compiles, whatever --timeout is
MOST_MARGIN_SECONDS = 5.0


@dataclass(frozen=True)
class Beat:
    """What a rank last said.

    Attributes:
        count: of its beats so far. Ranks go through the same phases: of two, the one with fewer is behind.
        step: the step it is in, 0 before the first.
        seconds: when, on the machine's monotonic clock.
    """

    count: int
    step: int
    phase: str
    seconds: float

    def where(self) -> str:
        words = RUN_PHASES[self.phase]
        return f"step {self.step}, {words}" if self.step and self.phase not in AFTER_THE_STEPS else words


class Pulse:
    """A rank's own end. Without a path only this process can read it."""

    def __init__(self, path: Path | None = None) -> None:
        self._memory: mmap.mmap | bytearray = bytearray(LAYOUT.size) if path is None else _shared_memory(path)
        self._count = self._step = 0
        self.beat("start")

    def beat(self, phase: str, step: int | None = None) -> None:
        """``phase``, one of RUN_PHASES, begins; ``step`` stays what it was where it is left out."""
        self._count += 1
        self._step = self._step if step is None else step
        LAYOUT.pack_into(self._memory, 0, self._count, self._step, NAMES.index(phase), time.monotonic())

    @property
    def last(self) -> Beat:
        return _unpack(self._memory)


def _shared_memory(path: Path) -> mmap.mmap:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        # written, not only made longer: on a full disk that fails here, and not as a SIGBUS at some beat
        os.write(fd, bytes(LAYOUT.size))
        return mmap.mmap(fd, LAYOUT.size)
    finally:
        os.close(fd)


def read_pulse(path: Path) -> Beat | None:
    """The last beat in the file that a Pulse keeps; None before its first."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    beat = _unpack(data) if len(data) == LAYOUT.size else None
    return beat if beat and beat.count else None


def _unpack(data: bytes | bytearray | mmap.mmap) -> Beat:
    count, step, phase, seconds = LAYOUT.unpack_from(data, 0)
    return Beat(count, step, NAMES[phase], seconds)


def patience_seconds(timeout_seconds: float, beat: Beat) -> float:
    """How long a rank may go without a beat before it counts as hung: a little less than --timeout, at which the
    collectives of its peers give up, since whoever hangs is to be named before these fail for want of it.
    """
    patience = timeout_seconds - min(MOST_MARGIN_SECONDS, timeout_seconds / 4)
    return patience if beat.step > 1 else max(patience, START_SECONDS)


def group_timeout_seconds(timeout_seconds: float) -> float:
    """The limit of a collective, which is that of the whole run, for a --timeout."""
    return max(timeout_seconds, START_SECONDS + MOST_MARGIN_SECONDS)
