"""The report as a Markdown table, as CSV, and as records in the form of benchmarks/results."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.report.cells import Cell
from benchmarks.report.reading import Found, Run

COLUMNS: dict[str, Callable[[list[dict]], str]] = {
    "step, ms": lambda runs: _spread(runs, "step_seconds", 1000, 1),
    "forward": lambda runs: _spread(runs, "forward_seconds", 1000, 1),
    "backward": lambda runs: _spread(runs, "backward_seconds", 1000, 1),
    "optimizer": lambda runs: _spread(runs, "optimizer_seconds", 1000, 1),
    "tokens/s": lambda runs: _spread(runs, "tokens_per_second", 1, 0),
    "model TFLOPS a device": lambda runs: _spread(runs, "model_tflops_per_device", 1, _digits(runs)),
    "MFU": lambda runs: _spread(runs, "mfu", 100, 1),
    "start to first step, s": lambda runs: median_and_range([run.get("first_step_seconds") for run in runs], 1, 1),
    "peak memory, MiB": lambda runs: median_and_range([_peak(run) for run in runs], 1, 0),
}
CSV_FIGURES = (
    "step_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds", "tokens_per_second",
    "model_tflops_per_device", "hardware_tflops_per_device", "mfu", "peak_device_memory_mib", "peak_host_memory_mib",
    "first_step_seconds", "first_loss", "last_loss",
)  # fmt: skip
CSV_SETTINGS = (
    "distplan", "model_type", "batch_size", "seq_len", "placement", "tp_degree", "pp_degree", "precision",
    "activation_checkpointing",
)  # fmt: skip


def _spread(runs: list[dict], key: str, factor: float, digits: int) -> str:
    """Of the medians over steps that each repeat has under ``key``."""
    return median_and_range([(run.get(key) or {}).get("median") for run in runs], factor, digits)


def _digits(runs: list[dict]) -> int:
    """Behind the point of TFLOPS: a CPU's are some thousandths."""
    return 1 if max(((run.get("model_tflops_per_device") or {}).get("median") or 0.0) for run in runs) >= 1 else 4


def _peak(summary: dict) -> float | None:
    device = summary.get("peak_device_memory_mib")
    return summary.get("peak_host_memory_mib") if device is None else device


def median_and_range(values: Sequence[float | None], factor: float, digits: int) -> str:
    """The median of the repeats, and from where to where they go if that shows; a dash for what was not measured."""
    known = [value * factor for value in values if value is not None]
    if not known:
        return "–"
    middle, low, high = (f"{pick(known):.{digits}f}" for pick in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low}–{high})"


HEADS = ("configuration", "runs", "parity", *COLUMNS, "device", "commit")


def row(cell: Cell) -> list[str]:
    """A cell's row: medians over runs of the medians over steps, with the range of the runs."""
    summaries = [dict(run.summary) for run in cell.timed]
    figures = [show(summaries) if summaries else cell.first.state for show in COLUMNS.values()]
    return [cell.label, str(len(cell.timed)), cell.parity, *figures, cell.card, cell.first.commit]


def markdown(cells: Sequence[Cell], found: Found) -> str:
    """The table, and below it what was skipped and what could not be read."""
    lines = [f"| {' | '.join(HEADS)} |", f"| --- | ---: | --- |{' ---: |' * len(COLUMNS)} --- | --- |"]
    lines += [f"| {' | '.join(row(cell))} |" for cell in cells]
    lines += ["", *(f"- skipped: {skipped.label}: {skipped.why}" for skipped in found.skipped)] if found.skipped else []
    lines += ["", *(f"- missing: {problem}" for problem in found.problems)] if found.problems else []
    return "\n".join(lines) + "\n"


def as_csv(cells: Sequence[Cell]) -> str:
    """A line per run, in full digits, with its folder, card, commit and command."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    facts = ("configuration", "run", "state", "timed", "gpus", "card", "commit", "parity", "command")
    writer.writerow([*facts[:5], *CSV_SETTINGS, *CSV_FIGURES, *facts[5:]])
    for cell in cells:
        for run in cell.runs:
            settings = [run.settings.get(name) for name in CSV_SETTINGS]
            figures = [run.median(name) for name in CSV_FIGURES]
            place = f"{run.source}/{run.place}"
            after = [run.card, run.commit, run.parity.get("verdict"), run.command]
            writer.writerow([cell.label, place, run.state, run.timed, run.gpus, *settings, *figures, *after])
    return out.getvalue()


def records(cells: Sequence[Cell], command: str) -> dict[str, Any]:
    """What benchmarks/results keeps: every run's summary, by case. benchmarks.report and benchmarks.images read it."""
    return {
        "command": command,
        "environment": dict(cells[0].first.environment) if cells else {},
        "cases": [
            {
                "label": cell.label,
                "flags": [word for name, value in _given(cell.first).items() for word in (f"--{name}", str(value))],
                "ranks": cell.gpus,
                "parity": next((dict(run.parity) for run in cell.runs if run.parity), {}),
                "runs": [dict(run.summary) for run in cell.timed],
            }
            for cell in cells
        ],
    }


def _given(run: Run) -> dict[str, Any]:
    """The settings that tell a cell from another."""
    return {name: run.settings[name] for name in CSV_SETTINGS if run.settings.get(name) is not None}
