"""What every sink is, and what it is opened with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from commons.reporting.header import RunHeader
from commons.reporting.record import StepRecord


class Sink(Protocol):
    """Takes what a run has to tell. Every method may raise SinkError."""

    def log(self, record: StepRecord) -> None:
        """Take the record of one step."""
        ...

    def report(self, summary: Mapping[str, Any]) -> None:
        """Take the summary, once, at the end or when the run is cut short."""
        ...

    def close(self) -> None:
        """Release what is held; harmless when called again."""
        ...


@dataclass(frozen=True)
class RunFacts:
    """What a sink may know of the run when it is opened.

    Attributes:
        run_dir: the run's folder, which is there.
        train_step: steps in all.
        warmup_step: the first of them, left out of the statistics.
        quiet: no line per step is wanted.
        log_every: only every so many steps a line is wanted.
    """

    run_dir: Path
    train_step: int
    warmup_step: int
    quiet: bool
    header: RunHeader
    log_every: int = 1
