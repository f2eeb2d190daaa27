"""Whether two sets of runs differ in speed, given the noise of their repeats: Welch's interval of the ratio.

A run counts once, by its median over steps: steps of one run are not independent of each other. The ratio is that of
the geometric means; its interval is Welch's, on logarithms, at 99 %. Two sets are called different where the interval
leaves out 1: of a hundred equal pairs about one is called different by chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.99
LEAST_RUNS = 3  # with two, the interval is some fifty times as wide as the noise
# Relative noise that a run is taken to have at least: repeats that agree by chance prove nothing.
LEAST_NOISE = 2e-4


@dataclass(frozen=True)
class Difference:
    """``ratio`` of the second set to the first (1.02: larger by 2 %), and its interval; None where nobody can tell."""

    ratio: float
    low: float | None
    high: float | None

    @property
    def is_judged(self) -> bool:
        return self.low is not None

    @property
    def is_different(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


def compare(before: Sequence[float], after: Sequence[float]) -> Difference:
    """The difference of two sets of positive numbers, one number per run, neither empty."""
    logs = [[math.log(value) for value in values] for values in (before, after)]
    mean = statistics.fmean(logs[1]) - statistics.fmean(logs[0])
    if min(len(before), len(after)) < LEAST_RUNS:
        return Difference(math.exp(mean), None, None)
    parts = [max(statistics.variance(values), LEAST_NOISE**2) / len(values) for values in logs]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, logs, strict=True))
    reach = student_quantile((1 + CONFIDENCE) / 2, freedom) * math.sqrt(sum(parts))
    return Difference(math.exp(mean), math.exp(mean - reach), math.exp(mean + reach))


def student_quantile(probability: float, freedom: float) -> float:
    """The value that Student's t with ``freedom`` (at least 1) degrees stays below with ``probability`` (over 0.5)."""
    # With t = sqrt(freedom) * tan(angle) the density is cos(angle) ** (freedom - 1), over its integral.
    whole = math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)) * math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        if 0.5 + _integral(angle, freedom - 1) / whole < probability:
            low = angle
        else:
            high = angle
    return math.sqrt(freedom) * math.tan(low)


def _integral(angle: float, power: float, pieces: int = 200) -> float:
    """Of cos ** power from 0 to ``angle``, by Simpson's rule."""
    width = angle / pieces
    values = [max(0.0, math.cos(i * width)) ** power for i in range(pieces + 1)]
    return width / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))
