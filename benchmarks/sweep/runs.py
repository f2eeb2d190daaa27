"""The runs of a sweep on the disk: where they are, and what became of them.

    OUT/sweep.json                 the command, and every cell in order
    OUT/CELL/cell.json             label and settings, and why it was skipped if it was
    OUT/CELL/run-1/                the run's own folder: config.json, env.json, metrics.jsonl, summary.json
    OUT/CELL/run-1.json            what the sweep saw: exit code, seconds, whether it took too long
    OUT/CELL/run-1.log             what it printed, kept where it did not finish
    OUT/CELL/parity/, trace/       the extra runs

A run's state comes from summary.json's ``ended``. Without run-1.json the sweep was cut off in it: unless it finished,
it is done again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.sweep.cell import Cell
from commons.reporting.writing import write_json

FINISHED, OUT_OF_MEMORY, TIMED_OUT, FAILED = "finished", "out of memory", "timed out", "failed"
# the exception's text in summary.json, or the launcher's sentence about a rank that the kernel killed
_NO_MEMORY = re.compile(r"OutOfMemoryError|out of memory|not enough memory|can't allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class Run:
    """One run of a cell: ``name`` is "run-1", "run-2" and so on, or that of an extra."""

    cell: Cell
    name: str
    out: Path

    @property
    def cell_folder(self) -> Path:
        return self.out / self.cell.id

    @property
    def folder(self) -> Path:
        return self.cell_folder / self.name

    @property
    def record(self) -> Path:
        return self.cell_folder / f"{self.name}.json"

    @property
    def console(self) -> Path:
        return self.cell_folder / f"{self.name}.log"

    def summary(self) -> Mapping[str, Any]:
        return read_json(self.folder / "summary.json")

    def state(self) -> str | None:
        """How it ended; None where it has to be run."""
        return state_of(self.summary(), read_json(self.record))


def state_of(summary: Mapping[str, Any], record: Mapping[str, Any]) -> str | None:
    """How a run ended, from its summary.json and the sweep's record, which may be empty; None: it is not done."""
    if summary.get("ended") == "finished":
        return FINISHED
    if not record:
        return None
    if record.get("timed_out"):
        return TIMED_OUT
    why = f"{summary.get('ended')}: {summary.get('ended_because') or ''}"
    return OUT_OF_MEMORY if _NO_MEMORY.search(why) else FAILED


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, or only half of one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_cell(cell: Cell, out: Path, skipped: str | None) -> None:
    """cell.json; ``skipped``: why the cell does not run, None if it does."""
    folder = out / cell.id
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"label": cell.label, "gpus": cell.gpus, "visible": cell.visible, "settings": dict(cell.settings)}
    write_json(folder / "cell.json", {**facts, "skipped": skipped})
