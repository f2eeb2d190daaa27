"""Standard output for a training that must not wait for whoever reads it."""

from __future__ import annotations

import contextlib
import os
import select
import stat
import time
from collections import deque
from typing import TextIO

MOST_PENDING_BYTES = 2**20  # some ten thousand lines
DRAIN_SECONDS = 2.0  # at the end, for a reader that is slow but there


class PatientStream:
    """Passes text on to a terminal or a pipe as far as its reader takes it, and keeps the rest for later.

    Where it has to keep too much, the oldest text goes, and a line says how many are missing. A file or anything else
    that needs no reader is written to directly. OSError when the reader has gone.

    Args:
        file: open for text; it stays open.

    Attributes:
        pending_bytes: kept for later, MOST_PENDING_BYTES at most after a flush().
    """

    def __init__(self, file: TextIO) -> None:
        file.flush()
        self._file = file
        self._own_fd = _own_description(file)
        self._pending: deque[bytes] = deque()
        self.pending_bytes = self._lost_lines = 0
        self._notice = b""
        self.encoding = file.encoding

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()

    def write(self, text: str) -> int:
        if self._own_fd is None:
            return self._file.write(text)
        data = text.encode(self.encoding, "replace")
        self._pending.append(data)
        self.pending_bytes += len(data)
        return len(text)

    def flush(self) -> None:
        """Pass on what the reader takes at once."""
        try:
            if self._own_fd is None:
                self._file.flush()
            else:
                self._send(self._own_fd)
        except OSError:
            self._discard()
            raise
        if self.pending_bytes > MOST_PENDING_BYTES:
            self._forget_the_oldest()

    def close(self) -> None:
        """Give the reader DRAIN_SECONDS to take the rest. Harmless when called again."""
        if self._own_fd is None:
            return
        try:
            deadline = time.monotonic() + DRAIN_SECONDS
            while self._pending and (left := deadline - time.monotonic()) > 0:
                select.select([], [self._own_fd], [], left)
                self.flush()
        finally:
            os.close(self._own_fd)
            self._own_fd = None

    def _send(self, fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._pending:
                data = self._pending.popleft()
                self._pending.appendleft(data)  # still here should the next line fail
                sent = os.write(fd, data)
                self.pending_bytes -= sent
                self._pending[0] = data[sent:]
                if not self._pending[0]:
                    self._pending.popleft()

    def _forget_the_oldest(self) -> None:
        begun = self._pending.popleft()  # its first part may be on the screen
        while self._pending and self.pending_bytes > MOST_PENDING_BYTES // 2:
            oldest = self._pending.popleft()
            self.pending_bytes -= len(oldest)
            if oldest is not self._notice:
                self._lost_lines += oldest.count(b"\n")
        self._notice = f"({self._lost_lines} lines are missing here: console.log has them)\n".encode()
        self._pending.extendleft([self._notice, begun])
        self.pending_bytes += len(self._notice)

    def _discard(self) -> None:
        """What could not be written would fail again when the interpreter flushes: a second, confusing error, and exit
        code 120.
        """
        self._pending.clear()
        self.pending_bytes = 0
        if self._own_fd is None:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._file.fileno())
                os.close(nowhere)


def _own_description(file: TextIO) -> int | None:
    """The pipe or terminal behind `file` once more, to be written to without waiting; None for anything else.

    Opened anew, since to stop waiting is a property of what is open, which other processes share: the shell too.
    """
    try:
        fd = file.fileno()
        if not (stat.S_ISFIFO(os.fstat(fd).st_mode) or os.isatty(fd)):
            return None
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:  # kept in memory, without a reader, another user's terminal, or no /proc
        return None
