"""Reads runs from folders and result files; what cannot be read is told, and the rest is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.sweep.grid import EXTRAS
from benchmarks.sweep.runs import FINISHED, state_of
from benchmarks.trace import breakdown, read_work

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """A run, or a repeat in a result file; what it did not leave is empty.

    Attributes:
        source: the folder or file that it was found under, as given.
        place: where in it.
        cell: what all repeats of one configuration share, besides card and commit.
        label: what the configuration is called, None where nobody named it.
        timed: whether its speed counts; the extra runs of a sweep are there for parity or a trace.
        state: "finished", "out of memory", "failed", "timed out" or "did not end".
        gpus: ranks.
        settings: config.json.
        environment: env.json.
        steps: the lines of metrics.jsonl.
        work: milliseconds by kind of work in a traced step.
    """

    source: str
    place: str
    cell: str
    label: str | None
    timed: bool
    state: str
    gpus: int
    settings: Json = field(default_factory=dict)
    environment: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    steps: tuple[Json, ...] = ()
    parity: Json = field(default_factory=dict)
    work: Json = field(default_factory=dict)
    forecast: Json = field(default_factory=dict)

    @property
    def card(self) -> str:
        """The device's name."""
        gpus = self.environment.get("gpus") or [None]
        return self.environment.get("device_name") or gpus[0] or self.environment.get("cpu") or "unknown device"

    @property
    def on_gpus(self) -> bool:
        return bool(self.environment.get("gpus"))

    @property
    def commit(self) -> str:
        return str(self.environment.get("commit") or "unknown")[:7]

    @property
    def command(self) -> str:
        return str(self.environment.get("launcher") or self.environment.get("command") or "unknown")

    def median(self, name: str) -> float | None:
        """The median over steps of a field of StepRecord; peaks are numbers already."""
        value = self.summary.get(name)
        value = value.get("median") if isinstance(value, Mapping) else value
        return value if isinstance(value, (int, float)) and math.isfinite(value) else None


@dataclass(frozen=True)
class Skipped:
    """A cell that a sweep did not run."""

    source: str
    label: str
    why: str


@dataclass
class Found:
    """What is in the folders; ``problems``: a line for everything that is missing from the report."""

    runs: list[Run] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read(sources: list[Path]) -> Found:
    """Everything under ``sources``: folders of runs or sweeps, and result files as in benchmarks/results."""
    found = Found()
    for source in sources:
        before = len(found.runs) + len(found.skipped)
        try:
            _read_source(source, found)
        except OSError as error:
            found.problems.append(f"{source}: cannot be read: {error.strerror}")
            continue
        if len(found.runs) + len(found.skipped) == before:
            found.problems.append(f"{source}: no run in it: give a folder of a sweep, of runs, or a result file")
    found.problems += _mixed(found.runs)
    return found


def _read_source(source: Path, found: Found) -> None:
    if not source.exists():
        raise FileNotFoundError(2, "no such file or folder")
    if source.is_file():
        _read_results(source, source, found)
        return
    list(source.iterdir())  # PermissionError here, not an empty answer below
    folders = {path.parent for name in ("config.json", "summary.json") for path in source.rglob(name)}
    for folder in sorted(folders):
        _read_run(folder, source, found)
    for path in sorted(source.rglob("cell.json")):
        cell = _read_json(path, found)
        if cell.get("skipped"):
            found.skipped.append(Skipped(str(source), str(cell.get("label")), str(cell["skipped"])))
    for path in sorted(source.glob("*.json")) if not folders else ():  # beside runs lies an earlier report's own
        _read_results(path, source, found)


def _read_run(folder: Path, source: Path, found: Found) -> None:
    settings, environment = (_read_json(folder / name, found) for name in ("config.json", "env.json"))
    summary, cell = (_read_json(path, found) for path in (folder / "summary.json", folder.parent / "cell.json"))
    record = _read_json(folder.with_suffix(".json"), found)
    if not summary:
        found.problems.append(f"{folder}: no summary.json: the run goes on, or was killed; left out")
        return
    if not settings:
        found.problems.append(f"{folder}: no config.json: nobody knows what ran; left out")
        return
    state = state_of(summary, record or {"exit_code": None}) or "did not end"
    found.runs.append(
        Run(
            source=str(source),
            place=folder.relative_to(source).as_posix(),
            cell=folder.parent.name if cell else _key(settings, environment),
            label=cell.get("label"),
            timed=state == FINISHED and not (cell and folder.name in EXTRAS),
            state=state,
            gpus=cell.get("gpus") or int((environment.get("environment") or {}).get("WORLD_SIZE") or 1),
            settings=settings,
            environment=environment,
            summary={**summary, "first_step_seconds": record.get("first_step_seconds")},
            steps=tuple(_read_steps(folder / "metrics.jsonl", found)),
            parity=_read_json(folder / "parity.json", found),
            work=_read_work(folder / "trace.json.gz", found),
            forecast=_read_json(folder / "forecast.json", found),
        )
    )


# what may differ between repeats of one configuration
_NOT_THE_CONFIGURATION = {
    "seed", "log_dir", "run_name", "quiet", "check_parity", "trace_step", "train_step", "warmup_step", "timeout",
    "max_restarts", "max_bad_steps", "chosen", "clip_grad_norm",
}  # fmt: skip


def _key(settings: Json, environment: Json) -> str:
    kept = {name: value for name, value in settings.items() if name not in _NOT_THE_CONFIGURATION}
    ranks = (environment.get("environment") or {}).get("WORLD_SIZE")
    return json.dumps([kept, ranks], sort_keys=True, default=str)


def _read_results(path: Path, source: Path, found: Found) -> None:
    """A file of benchmarks/results with cases; other files are not for this."""
    document = _read_json(path, found)
    cases = document.get("cases")
    if not isinstance(cases, list):
        return
    environment = document.get("environment") or {}
    place = path.relative_to(source).as_posix() if path != source else path.name
    for case in cases:
        runs = case.get("runs") if isinstance(case, Mapping) else None
        for number, summary in enumerate(runs if isinstance(runs, list) else []):
            good = "error" not in summary
            settings = _settings_of(case)
            found.runs.append(
                Run(
                    source=str(source),
                    place=f"{place}#{case.get('label')} run {number + 1}",
                    cell=str(case.get("label")),
                    label=case.get("label"),
                    timed=good,
                    state=FINISHED if good else "failed",
                    gpus=int(case.get("ranks") or 1),
                    settings=settings,
                    environment={"command": document.get("command"), **environment},
                    summary=summary,
                    parity=case.get("parity") or {},
                )
            )


def _settings_of(case: Json) -> dict[str, Any]:
    """What the flags of a case say; and its label, where they are silent."""
    words = [str(word) for word in case.get("flags") or []]
    settings: dict[str, Any] = {
        name.removeprefix("--"): value for name, value in pairwise(words) if name.startswith("--")
    }
    label = str(case.get("label"))
    plan = next((word.strip(",") for word in label.split() if word.startswith(("CAI_", "Pytorch_"))), None)
    size = next((word.strip(",") for word in label.split() if word.startswith("gpt")), None)
    return {**({"distplan": plan} if plan else {}), **({"model_type": size} if size else {}), **settings}


def _read_json(path: Path, found: Found) -> dict[str, Any]:
    """The object in a file; empty where there is none, or only a part of one, which is told."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        found.problems.append(f"{path}: unreadable or half-written: left out")
        return {}
    return value if isinstance(value, dict) else {}


def _read_steps(path: Path, found: Found) -> Iterator[Json]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for number, line in enumerate(lines):
        try:
            step = json.loads(line)
        except ValueError:
            found.problems.append(f"{path}: line {number + 1} is half-written: left out")
            continue
        if isinstance(step, dict):
            yield step


def _read_work(path: Path, found: Found) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        work = read_work(path)
    except (OSError, EOFError, ValueError, KeyError):
        found.problems.append(f"{path}: unreadable or half-written: left out")
        return {}
    return breakdown(work) if work else {}


def _mixed(runs: list[Run]) -> Iterator[str]:
    """Different cards and commits in one report are told; their numbers have rows of their own."""
    cards = sorted({run.card for run in runs if run.timed})
    if len(cards) > 1:
        yield f"different cards side by side: {', '.join(cards)}: conclusions are drawn for each alone"
    for source in sorted({run.source for run in runs}):
        commits = sorted({run.commit for run in runs if run.source == source and run.timed})
        if len(commits) > 1:
            yield f"{source}: mixed commits: {', '.join(commits)}: in rows of their own"
