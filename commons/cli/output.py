"""Checks of where a run writes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from commons.cli.job import Job
from commons.cli.wording import unknown
from commons.lifecycle.job import read_job
from commons.reporting.sinks.services import SERVICES, is_installed, service_names

MAX_RUN_NAME = 200  # file systems end at 255 bytes, and files are named after the run


def output(job: Job) -> Iterator[str]:
    folder, name = Path(job.config.log_dir), job.config.run_name
    yield from folder_problem(folder)
    yield from sink_problems(job.config.sinks)
    if "run_name" not in job.typed:
        return
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or len(name) > MAX_RUN_NAME:
        yield (
            f"--run_name {name!r} must be a folder's name of at most {MAX_RUN_NAME} characters, inside"
            f" --log_dir: use one without '/', for example --run_name {_plain(name)}"
        )
    elif (folder / name / "config.json").exists() and read_job().attempt == 1 and not job.config.resume:
        yield (f"--run_name {name}: {folder / name} already holds a run: choose another name, or move that folder away")


def sink_problems(sinks: str) -> Iterator[str]:
    """Of ``--sinks``: names that do not exist, and what is not installed."""
    for name in service_names(sinks):
        if name not in SERVICES:
            yield unknown("sinks", name, SERVICES)
        elif not is_installed(name):
            yield f"--sinks {name}: it is not installed: pip install {SERVICES[name].package}"


def folder_problem(folder: Path, flag: str = "log_dir") -> Iterator[str]:
    """Whether the ``folder`` of a flag could be made and written to. Only trying tells, which leaves no trace."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        yield f"--{flag} {folder}: {existing} is a file, not a folder: choose another --{flag}"
        return
    try:
        tempfile.TemporaryDirectory(prefix=".write_test_", dir=existing).cleanup()
    except OSError as error:
        yield (
            f"--{flag} {folder}: nothing can be written in {existing} ({error.strerror}): choose another"
            f" --{flag}, or make that one writable"
        )


def _plain(name: str) -> str:
    """The name without what may not be in it, as a suggestion."""
    kept = "".join(c if c.isalnum() or c in "._-" else "_" for c in name).strip("._-")
    return kept[:MAX_RUN_NAME] or "my_run"
