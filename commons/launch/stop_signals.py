"""The launcher's own stop signals: raised wherever it is at, or kept for it while that would do harm.

A handler runs between any two instructions of Python, so what it raises can land in a ``finally`` of torch's engine
that then fails for another reason, or in the middle of ``subprocess`` with a lock in its hands. While the engine runs,
the first signal is therefore only kept; commons.launch.agent raises it where the engine expects it.
``prof``: https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/elastic/metrics/api.py
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from commons.lifecycle.outcome import STOP_SIGNALS


class Stopped(BaseException):
    """A signal asked the launcher to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class StopSignals:
    """Answers the stop signals of this process from its creation on.

    Attributes:
        handled: those of STOP_SIGNALS that are not to be ignored (nohup ignores SIGHUP).
        kept: the first that came inside of :meth:`keeping`, 0 if none did.
    """

    def __init__(self) -> None:
        self.handled = [signum for signum in STOP_SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
        self.kept = 0
        self._keeps = False
        for signum in self.handled:
            signal.signal(signum, self.answer)

    def answer(self, signum: int, _: object) -> None:
        """The handler."""
        if signum not in self.handled:
            return  # torch 2.5's engine takes SIGHUP whatever it is told
        if not self._keeps:
            raise Stopped(signum)
        self.kept = self.kept or signum

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep what comes. A second signal asks for nothing new."""
        self._keeps = True
        try:
            yield
        finally:
            self._keeps = False
