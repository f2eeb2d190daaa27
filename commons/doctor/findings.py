"""Finding: one thing the doctor found out, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    id: stable; "<check>" where all is well, "<check>.<cause>" otherwise. A check's function gives the cause
        alone; diagnosis.py puts the check's name before it.
    seen: the evidence, as read from the machine.
    why: what it leads to in a training run.
    cure: shell commands, one a line; never empty for a warning or an error.
    """

    id: str
    level: Level
    title: str
    seen: str = ""
    why: str = ""
    cure: str = ""
    topic: str = ""


def ok(title: str, seen: str = "", why: str = "") -> Finding:
    return Finding("", "ok", title, seen, why)


def warning(cause: str, title: str, *, seen: str, why: str, cure: str) -> Finding:
    return Finding(cause, "warning", title, seen, why, cure)


def error(cause: str, title: str, *, seen: str, why: str, cure: str) -> Finding:
    return Finding(cause, "error", title, seen, why, cure)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if anything here stops a training run, else 0: warnings do not count."""
    return int(any(finding.level == "error" for finding in findings))
