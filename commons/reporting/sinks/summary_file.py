"""summary.json: the statistics of a run, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commons.reporting.record import StepRecord
from commons.reporting.sinks.sink import RunFacts
from commons.reporting.writing import write_json


class SummarySink:
    """summary.json, written whole when the run reports."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log(self, record: StepRecord) -> None:
        pass

    def report(self, summary: Mapping[str, Any]) -> None:
        write_json(self.path, summary)

    def close(self) -> None:
        pass


def open_summary_file(run: RunFacts) -> SummarySink:
    return SummarySink(run.run_dir / "summary.json")
