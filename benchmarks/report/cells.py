"""Runs of one configuration, on one card, at one commit: a row of the report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.reading import Run

UNCHECKED = "not checked"


@dataclass(frozen=True)
class Cell:
    """One configuration and its runs.

    Attributes:
        number: from 1, in the order of the report.
        label: what it is called.
        timed: the runs whose speed counts.
        runs: all of them, those for parity and traces and those that failed included.
    """

    number: int
    label: str
    timed: tuple[Run, ...]
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        return (self.timed or self.runs)[0]

    def setting(self, name: str, default: Any = None) -> Any:
        value = self.first.settings.get(name)
        return default if value is None else value

    @property
    def plan(self) -> str:
        return str(self.setting("distplan", "unknown plan"))

    @property
    def model(self) -> str:
        return str(self.setting("model_type", "unknown size"))

    @property
    def gpus(self) -> int:
        return self.first.gpus

    @property
    def card(self) -> str:
        return self.first.card

    @property
    def devices(self) -> str:
        """ "2 × NVIDIA H100", "2 CPU ranks of an AMD EPYC"."""
        if self.first.on_gpus:
            return f"{self.gpus} × {self.card}"
        return f"{self.gpus} CPU rank{'s' * (self.gpus > 1)} ({self.card})"

    def values(self, name: str) -> list[float]:
        """Of every timed run that has it: the median over its steps."""
        return [value for run in self.timed if (value := run.median(name)) is not None]

    def median(self, name: str) -> float | None:
        values = self.values(name)
        return statistics.median(values) if values else None

    @property
    def memory_mib(self) -> float | None:
        """The peak of the device, or of the process where there is no device."""
        device = self.median("peak_device_memory_mib")
        return self.median("peak_host_memory_mib") if device is None else device

    @property
    def speed(self) -> float | None:
        """Tokens per second of all devices."""
        return self.median("tokens_per_second")

    @property
    def parity(self) -> str:
        """What the comparison with the fp32 reference found, over all runs that made it."""
        verdicts = [str(run.parity.get("verdict")) for run in self.runs if run.parity]
        if not verdicts:
            return UNCHECKED
        bad = [verdict for verdict in verdicts if verdict != "holds"]
        return bad[0] if bad else "holds"


def group(runs: Sequence[Run]) -> list[Cell]:
    """The cells of the runs: by source, size, plan, ranks and label. Those that have no finished run come too."""
    by_cell: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        by_cell.setdefault((run.source, run.cell, run.card, run.commit, str(run.gpus)), []).append(run)
    ordered = sorted(by_cell.values(), key=lambda found: _order(found[0]))
    labels = [_label(found[0], [other[0] for other in ordered]) for found in ordered]
    return [
        Cell(number + 1, label, tuple(run for run in found if run.timed), tuple(found))
        for number, (found, label) in enumerate(zip(ordered, labels, strict=True))
    ]


def _order(run: Run) -> tuple[Any, ...]:
    size = (run.settings.get("num_layers") or 0) * (run.settings.get("hidden_size") or 0) ** 2
    names = ("model_type", "distplan")
    return (
        run.source,
        run.card,
        size,
        *(str(run.settings.get(name)) for name in names),
        run.gpus,
        run.label or "",
        run.cell,
    )


# what tells runs without a label apart
_TOLD = ("batch_size", "seq_len", "placement", "tp_degree", "pp_degree", "precision", "activation_checkpointing")
_WORDS = {"batch_size": "batch {}", "seq_len": "sequence {}", "tp_degree": "tp {}", "pp_degree": "pp {}"}


def _label(run: Run, others: Sequence[Run]) -> str:
    if run.label is not None:
        return run.label
    settings = run.settings
    told = [name for name in _TOLD if len({str(other.settings.get(name)) for other in others}) > 1]
    words = [str(settings.get("distplan")), str(settings.get("model_type"))]
    words += [_WORDS.get(name, f"{name} {{}}").format(settings[name]) for name in told if name in settings]
    return f"{', '.join(words)} × {run.gpus}"


def by(cells: Sequence[Cell], key: Any) -> Mapping[Any, list[Cell]]:
    """The cells by what ``key`` says of them, in their order."""
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups
