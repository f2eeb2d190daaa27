"""Keeps what a run prints: shown where it would have been shown anyway, and written to console.log.

The ranks inherit the launcher's standard output and error. While a ConsoleCopy is open these lead to a thread
that keeps a copy, and from there to one that passes everything on: whoever reads it may be slow, or stand still for
hours (Ctrl-S, a stopped pager), and the ranks go on. A terminal is replaced by a pseudo-terminal, so that progress
bars still see one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import sys
import termios
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path

STDOUT, STDERR = 1, 2
READ_BYTES = 65536
POLL_SECONDS = 0.5
DRAIN_SECONDS = 2.0
READER_SECONDS = 120.0  # at the end of a run, for a reader that takes nothing at all
MOST_WAITING_BYTES = 16 * 2**20  # for a slow reader; beyond that, it is told what it does not get
ESCAPE_SEQUENCES = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")


class LogFile:
    """console.log: whole lines, without colours, and of a line that was redrawn only how it ended."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab")  # noqa: SIM115  closed by close()
        self._lock = threading.Lock()
        self.error: OSError | None = None

    def write(self, lines: bytes) -> None:
        with self._lock:
            if self.error is None and lines:
                try:
                    self._file.write(lines)
                    self._file.flush()
                except OSError as error:  # a full disk must not end the run; the user is told at the end
                    self.error = error

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class LineCleaner:
    """Turns a stream as a terminal gets it into the lines that a reader of a file wants."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > READ_BYTES:  # a bar redrawn for hours never ends its line
            self._rest = self._rest[self._rest.rfind(b"\r") + 1 :]
        return b"".join(map(self._clean, lines))

    def finish(self) -> bytes:
        rest, self._rest = self._rest, b""
        return self._clean(rest) if rest else b""

    @staticmethod
    def _clean(line: bytes) -> bytes:
        text = ESCAPE_SEQUENCES.sub(b"", line).rstrip(b"\r")
        text = text[text.rfind(b"\r") + 1 :]
        return b"" if line and not text.strip() else text + b"\n"


class ConsoleCopy:
    """Context manager: everything printed inside, also by child processes, is copied to ``path``.

    Children must have ended before it is left; what a stray one prints later is lost. Unless tells_at_the_end
    is made False, a copy that could not be written whole is told of when it is left.

    Args:
        path: appended to. OSError if it cannot be opened.
        already_shown: lines that belong into the copy and were printed before.
    """

    def __init__(self, path: Path, already_shown: Sequence[str] = ()) -> None:
        self._log = LogFile(path)
        self._path = path
        self._channels: list[_Channel] = []
        self.tells_at_the_end = True
        self._log.write("".join(f"{line}\n" for line in already_shown).encode())

    def __enter__(self) -> ConsoleCopy:
        _flush()
        # one channel where both lead to the same place: lines stay in order
        together = os.path.sameopenfile(STDOUT, STDERR)
        for fds in [(STDOUT, STDERR)] if together else [(STDOUT,), (STDERR,)]:
            self._channels.append(_Channel(fds, self._log, self._path))
        return self

    def __exit__(self, *_: object) -> None:
        _flush()
        for channel in self._channels:
            channel.close()
        self._log.close()
        if self._log.error is not None and self.tells_at_the_end:
            print(f"{self._path} is not complete: {self._log.error.strerror}", file=sys.stderr, flush=True)


class _Screen:
    """What is to be shown, and the thread that shows it: only this one waits for whoever reads.

    Args:
        fd: where to, blocking or not.
        log: the name of the file that has everything, for a reader that was too slow.
    """

    def __init__(self, fd: int, log: Path) -> None:
        self._fd, self._log = fd, log
        self._waiting: deque[bytes] = deque()
        self._bytes = self._left_out = 0
        self._changed = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._show_all, name="screen", daemon=True)
        self._thread.start()

    def add(self, data: bytes) -> None:
        with self._changed:
            if self._bytes + len(data) > MOST_WAITING_BYTES:
                self._left_out += len(data)
                return
            self._tell_what_was_left_out()
            self._append(data)

    def _append(self, data: bytes) -> None:
        self._waiting.append(data)
        self._bytes += len(data)
        self._changed.notify_all()

    def _tell_what_was_left_out(self) -> None:
        if self._left_out:
            told = f"\n[{self._left_out} bytes are not shown, as nothing was read here: {self._log} has all]\n"
            self._left_out = 0
            self._append(told.encode())

    def close(self) -> bool:
        """Wait until all is shown, as long as anything is read; whether that is so."""
        with self._changed:
            self._tell_what_was_left_out()
            self._over = True
            self._changed.notify_all()
            while self._bytes and self._changed.wait(READER_SECONDS):
                pass
            if self._bytes:
                return False
        self._thread.join()
        return True

    def _show_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._over)
                if not self._waiting:
                    return
                data = self._waiting.popleft()
            self._show(data)

    def _show(self, data: bytes) -> None:
        while data:
            try:
                shown = os.write(self._fd, data)
            except BlockingIOError:  # another process has made it so: it is theirs too
                select.select([], [self._fd], [], POLL_SECONDS)
                continue
            except OSError:  # the reader is gone (`| head`); the copy goes on
                shown = len(data)
            data = data[shown:]
            with self._changed:
                self._bytes = max(0, self._bytes - shown)
                self._changed.notify_all()


class _Channel:
    """One replaced stream: ``fds`` lead into a pipe or pseudo-terminal, a thread copies and shows what comes out."""

    def __init__(self, fds: tuple[int, ...], log: LogFile, path: Path) -> None:
        self._fds, self._log, self._lines = fds, log, LineCleaner()
        self._real = os.dup(fds[0])
        self._screen = _Screen(self._real, path)
        self._is_terminal = os.isatty(self._real)
        self._source, entry = _open_terminal() if self._is_terminal else os.pipe()
        self._copy_window_size()
        for fd in fds:
            os.dup2(entry, fd)
        os.close(entry)
        self._stop = False
        self._thread = threading.Thread(target=self._relay, name="console copy", daemon=True)
        self._thread.start()

    def close(self) -> None:
        for fd in self._fds:
            os.dup2(self._real, fd)
        self._thread.join(DRAIN_SECONDS)
        self._stop = True
        self._thread.join()
        self._log.write(self._lines.finish())
        os.close(self._source)
        if self._screen.close():
            os.close(self._real)

    def _relay(self) -> None:
        while not self._stop:
            ready, _, _ = select.select([self._source], [], [], POLL_SECONDS)
            self._copy_window_size()
            if not ready:
                continue
            try:
                data = os.read(self._source, READ_BYTES)
            except OSError:  # how a pseudo-terminal says that its last writer is gone
                data = b""
            if not data:
                return
            self._screen.add(data)
            self._log.write(self._lines.feed(data))

    def _copy_window_size(self) -> None:
        if self._is_terminal:
            with contextlib.suppress(OSError):
                size = fcntl.ioctl(self._real, termios.TIOCGWINSZ, struct.pack("4H", 0, 0, 0, 0))
                fcntl.ioctl(self._source, termios.TIOCSWINSZ, size)


def _open_terminal() -> tuple[int, int]:
    """A pseudo-terminal's two ends, or a pipe's where the system has none left. Line ends pass unchanged."""
    try:
        source, entry = os.openpty()
    except OSError:
        return os.pipe()
    attributes = termios.tcgetattr(entry)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(entry, termios.TCSANOW, attributes)
    return source, entry


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
