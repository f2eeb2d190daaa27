"""How long a training will take from here on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

RECENT_STEPS = 100


class Forecast:
    """Looks at when the last steps ended, with whatever is done between steps: evaluations, saving, logging.

    Args:
        now: seconds, of a clock that never goes back.
    """

    def __init__(self, total_steps: int, now: Callable[[], float] = time.monotonic) -> None:
        self._total_steps, self._now = total_steps, now
        self._ends: deque[tuple[int, float]] = deque(maxlen=RECENT_STEPS + 1)

    def seconds_left(self, step: int) -> float | None:
        """Until the last step ends, where ``step`` has just done so; None as long as nothing is known."""
        self._ends.append((step, self._now()))
        (first, begin), (last, end) = self._ends[0], self._ends[-1]
        if last == first:
            return None
        return (end - begin) / (last - first) * (self._total_steps - step)
