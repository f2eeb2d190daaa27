"""metrics.jsonl: a line per step."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from commons.reporting.record import StepRecord
from commons.reporting.sinks.sink import RunFacts
from commons.reporting.writing import to_json, writing


class JsonlSink:
    """metrics.jsonl: a JSON object per step, its keys the fields of StepRecord.

    When log() returns, the line is with the kernel: killing the process cannot lose it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with writing(path):
            # Unbuffered: nothing that a kill could lose, and nothing left to fail a second time at close.
            self._file = open(path, "wb", buffering=0)  # noqa: SIM115

    def log(self, record: StepRecord) -> None:
        line = memoryview((to_json(record) + "\n").encode())
        written = 0
        with writing(self.path):
            try:
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                self._take_back(written)
                raise

    def report(self, summary: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        with writing(self.path):
            self._file.close()

    def _take_back(self, written: int) -> None:
        # A disk that fills up takes the first part of a line; the file must keep whole lines only.
        with contextlib.suppress(OSError):
            if written:
                self._file.truncate(self._file.tell() - written)


def open_metrics_file(run: RunFacts) -> JsonlSink:
    return JsonlSink(run.run_dir / "metrics.jsonl")
