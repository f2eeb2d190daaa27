"""A rank's guard: sees to it that the rank ends in order, whatever comes.

Signals reach a thread of its own through a pipe, so that a rank in a collective or a compiler hears them too.
A rank at work finishes the step, if that takes less than GRACE_SECONDS; which step is the last, the ranks
agree on in the all-gather that they do anyway. Else, and where there is nothing to finish, the thread ends the
process. Only the standard library is needed here: the guard is on duty before the imports that take seconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from commons.lifecycle import leaving
from commons.lifecycle.heartbeat import MOST_MARGIN_SECONDS, Pulse, patience_seconds
from commons.lifecycle.job import read_job
from commons.lifecycle.memory_shortage import shortage
from commons.lifecycle.outcome import (
    FINISHED,
    OUT_OF_MEMORY,
    STOP_SIGNALS,
    Ended,
    RunError,
    leave_note,
    stopped_by,
)
from commons.lifecycle.standard_streams import open_missing_streams

WATCH_VARIABLE = "GEMINI_WATCH"  # the folder in which the launcher reads the ranks' pulses
TRACEBACK_FILE = "traceback.txt"
GRACE_SECONDS = 4.0  # for the step at hand; the launcher kills after 6, and 10 is what a user is promised
PEER_SECONDS = 3.0  # in which torchrun's engine tells a rank whose peer has gone


class Guard:
    """Created bare it only counts beats, for code that trains without being a run; on_duty() makes a real one.

    Attributes:
        watched: a launcher reads this rank's pulse.
        signum: of the first stop signal that came, 0 before.
        ended: how the run ends, once that is known.
        last_words: called when the process must end now, in any thread; writes what there is.
        advise: adds to the end of a run that is out of memory what else summary.json is to have, and lines for the
            user.
        folder: the run's, where the traceback of such a run is kept; None where it is not known yet.
    """

    def __init__(self, pulse: Pulse | None = None, watched: bool = False) -> None:
        job = read_job()
        self.rank, self._world_size = job.rank, job.world_size
        self.watched = watched
        self.signum = 0
        self.ended = FINISHED
        self.last_words: Callable[[Ended], None] | None = None
        self.advise: Callable[[Ended], tuple[Ended, list[str]]] = lambda ended: (ended, [])
        self.folder: Path | None = None
        self._advice: list[str] = []
        self.timeout_seconds = float("inf")
        self.steps = self.steps_done = 0
        self._pulse = pulse or Pulse()
        self._at_work = False
        self._deadline = float("inf")
        self._reported = False
        self._heard = threading.Event()
        self._alarm: int | None = None  # what is written here wakes the thread

    # ---- the work, told by whoever does it

    def beat(self, phase: str, step: int | None = None) -> None:
        """``phase`` (one of heartbeat.RUN_PHASES) begins, in step ``step`` if that is another one than before."""
        self._pulse.beat(phase, step)

    @contextlib.contextmanager
    def at_work(self, steps: int) -> Iterator[None]:
        """The training loop: a signal that comes inside waits for the end of the step."""
        self.steps, self._at_work = steps, True
        yield  # no `finally`: after an exception there is nothing to interrupt, and after the last step little

    @property
    def finished(self) -> bool:
        """All steps are done, or nothing has come in between yet."""
        return self.ended is FINISHED

    def stop_after(self, step: int, signums: list[int]) -> bool:
        """Whether ``step`` was the last, since any rank had heard a signal when the ranks spoke last.

        Args:
            signums: every rank's, the same list on each.
        """
        self.steps_done = step
        heard = max(signums)
        if heard and step < self.steps:
            self.ended = stopped_by(heard, step, self.steps)
            self._hurry()
        return bool(heard)

    # ---- the end

    def leave(self) -> NoReturn:
        """End this rank as ``ended`` says (collective)."""
        self.beat("end")
        if self.ended.exit_code == 0:
            leaving.leave(0)
        self._hurry()
        if self.rank == 0:
            self._say_unless_watched(self.ended.why)
        leave_note(self.ended)
        # a rank that is gone ends the others: none may go before rank 0 has written everything
        leaving.leave_together(self.ended.exit_code)

    def why_failed(self, error: BaseException) -> Ended:
        """How the run ends with ``error``: after a signal an error is only its consequence."""
        if self.signum:
            return stopped_by(self.signum, self.steps_done, self.steps)
        if self.ended.how == OUT_OF_MEMORY:  # looked at where it came, before anything was freed
            return self.ended
        if lack := shortage(error, self.rank, self._pulse.last):
            self.ended = lack.ended(self._world_size)
            with contextlib.suppress(Exception):  # where memory is short, anything may fail
                self.ended, self._advice = self.advise(self.ended)
            return self.ended
        text = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
        return Ended("failed", text.strip())

    def fail(self, error: BaseException) -> None:
        """End this rank, and so the run, for ``error``. Returns where its traceback is to be shown."""
        if isinstance(error, RunError):
            self._say_unless_watched(str(error))
            leave_note(Ended("failed", str(error), error.exit_code))
            os._exit(error.exit_code)
        if (ended := self.why_failed(error)).how == OUT_OF_MEMORY:
            self._end_out_of_memory(error, ended)
        if leaving.is_loss_of_a_peer(error):
            # the peer's own end is the one to be told of: this one was only waiting for it
            self._heard.wait(PEER_SECONDS)
        if self.signum:
            os._exit(128 + self.signum)
        record_exception(error)

    def _end_out_of_memory(self, error: BaseException, ended: Ended) -> NoReturn:
        """With a sentence instead of the traceback, which is kept in the run's folder. Where several ranks ran out, the
        first to write that file tells.
        """
        where, is_first = self._keep_traceback(error)
        if is_first:
            self._say_unless_watched("\n".join([ended.why, *self._advice, where]))
        leave_note(ended, where)
        os._exit(ended.exit_code)

    def _keep_traceback(self, error: BaseException) -> tuple[str, bool]:
        """What is to be said of where it is, or itself where it cannot be kept; whether no other rank has kept its."""
        text = "".join(traceback.format_exception(error)).rstrip()
        if self.folder is None:
            return text, True
        path = self.folder / TRACEBACK_FILE
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(f"Rank {self.rank} of {self._world_size}\n{text}\n")
        except FileExistsError:
            return traceback_line(path), False
        except OSError:
            return text, True
        return traceback_line(path), True

    def _hurry(self) -> None:
        """From here on the process has GRACE_SECONDS to end."""
        self._deadline = min(self._deadline, time.monotonic() + GRACE_SECONDS)
        if self._alarm is not None:
            with contextlib.suppress(BlockingIOError):
                os.write(self._alarm, b"\0")

    def _end_now(self, ended: Ended) -> NoReturn:
        if self.last_words is not None:
            with contextlib.suppress(Exception):
                self.last_words(ended)
        if self.rank == 0:
            self._say_unless_watched(ended.why)
        os._exit(ended.exit_code)

    def _say_unless_watched(self, text: str) -> None:
        """On standard error; the launcher says the same, last of all."""
        if self.watched or not text:
            return
        # whoever should read it may have stopped doing so: never block
        if select.select([], [sys.stderr.fileno()], [], 0.5)[1]:
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), f"{text}\n".encode())

    # ---- the thread

    def listen(self) -> None:
        """Take the stop signals, but for those that are to be ignored (nohup ignores SIGHUP)."""
        reader, self._alarm = os.pipe()
        os.set_blocking(self._alarm, False)
        signal.set_wakeup_fd(self._alarm, warn_on_full_buffer=False)
        for signum in STOP_SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                signal.signal(signum, lambda *_: None)  # what is done about it is done by the thread
                signal.siginterrupt(signum, False)
        threading.Thread(target=self._listen, args=(reader,), name="guard", daemon=True).start()

    def _listen(self, reader: int) -> None:
        while True:
            wait = min(1.0, max(0.05, self._next_look() - time.monotonic()))
            forever = self.watched and self._deadline == float("inf")  # no wake-ups beside a step that is timed
            if select.select([reader], [], [], None if forever else wait)[0]:
                for signum in os.read(reader, 64):
                    if signum in STOP_SIGNALS:
                        self._hear(signum)
            self._look()

    def _hear(self, signum: int) -> None:
        if self.signum:
            return  # Slurm tells the ranks and the launcher, which tells the ranks again
        self.signum = signum
        self._heard.set()
        if self._at_work:
            self._hurry()
        else:
            self._end_now(stopped_by(signum, 0, self.steps))

    def _next_look(self) -> float:
        return min(self._deadline, self._pulse.last.seconds + self._patience())

    def _patience(self) -> float:
        return patience_seconds(self.timeout_seconds, self._pulse.last)

    def _look(self) -> None:
        now, beat = time.monotonic(), self._pulse.last
        if now >= self._deadline:
            by_signal = self.signum and self.ended is FINISHED
            self._end_now(stopped_by(self.signum, self.steps_done, self.steps) if by_signal else self.ended)
        if self.watched:
            return
        quiet, patience = now - beat.seconds, self._patience()
        if quiet < patience:
            self._reported = False
        elif not self._reported:
            self._reported = True
            print(f"Rank {self.rank} made no progress for {quiet:.0f} s, in {beat.where()}:", file=sys.stderr)
            print("".join(self._stacks()), end="", file=sys.stderr, flush=True)
        elif quiet > patience + 2 * MOST_MARGIN_SECONDS:
            why = f"Rank {self.rank} hung in {beat.where()}: no progress for {quiet:.0f} s (--timeout)."
            self._end_now(Ended("hung", why))

    @staticmethod
    def _stacks() -> Iterator[str]:
        """Of all threads but the guard's own."""
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                yield f'Thread "{names.get(ident, ident)}":\n'
                yield from traceback.format_stack(frame)


def traceback_line(path: Path) -> str:
    return f"The traceback is in {path}."


def pulse_path(folder: Path, attempt: int, rank: int) -> Path:
    return folder / f"{attempt}-{rank}.pulse"


def stack_path(folder: Path, attempt: int, rank: int) -> Path:
    """Where the rank's faulthandler writes its stack when it is sent SIGUSR2."""
    return folder / f"{attempt}-{rank}.stack"


@contextlib.contextmanager
def on_duty() -> Iterator[Guard]:
    """A guard for the whole life of this rank. Exceptions end the rank in order too."""
    open_missing_streams()
    faulthandler.enable()
    folder = os.environ.get(WATCH_VARIABLE)
    pulse = _shared_pulse(Path(folder)) if folder else None
    guard = Guard(pulse, watched=pulse is not None)
    guard.listen()
    try:
        yield guard
    except Exception as error:
        guard.fail(error)
        raise


def _shared_pulse(folder: Path) -> Pulse | None:
    """The pulse that the launcher reads, and before its first beat the answer to SIGUSR2; None where the
    folder cannot be written to.
    """
    here = read_job()
    place = (here.attempt, here.rank)
    try:
        stack = open(stack_path(folder, *place), "w")  # noqa: SIM115  open as long as the process
        faulthandler.register(signal.SIGUSR2, stack, all_threads=True)
        return Pulse(pulse_path(folder, *place))
    except OSError:
        return None


def record_exception(error: BaseException) -> None:
    """For torchrun's engine and the launcher: the error with its traceback."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
