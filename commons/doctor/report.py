"""Findings as text for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TextIO

from commons.doctor.findings import Finding, exit_code

# Raised when a key below is renamed or goes. Finding ids come and go without it; those in the README stay.
SCHEMA_VERSION = 1
COLOURS = {"ok": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"
MARGIN = " " * 9
WIDEST = 110


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """{"schema": "gemini-doctor", "schema_version", "exit_code", "counts": {level: int}, "findings": [...]}.

    Each finding holds the texts id, level ("ok", "warning" or "error"), topic, title, seen, why and cure.
    """
    counts = Counter(finding.level for finding in findings)
    return {
        "schema": "gemini-doctor",
        "schema_version": SCHEMA_VERSION,
        "exit_code": exit_code(findings),
        "counts": {level: counts[level] for level in COLOURS},
        "findings": [asdict(finding) for finding in findings],
    }


def print_json(findings: Sequence[Finding], stream: TextIO = sys.stdout) -> None:
    print(json.dumps(as_json(findings), indent=2), file=stream)


def wants_colour(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """https://no-color.org: a set and non-empty NO_COLOR turns colour off."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


def paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{PLAIN}" if colour else text


def as_text(findings: Sequence[Finding], *, colour: bool = False, width: int | None = None) -> str:
    """A line for each good finding; for the others what was seen, why it matters, and the cure to copy."""
    width = min(width or shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
    return "\n".join(line for finding in findings for line in finding_lines(finding, colour, width))


def finding_lines(finding: Finding, colour: bool, width: int) -> list[str]:
    head = paint(f"{finding.level:<8}", COLOURS[finding.level], colour)
    if finding.level == "ok":
        details = f" ({finding.seen})" if finding.seen else ""
        text = f"{finding.title}{details}{f'. {finding.why}' if finding.why else ''}"
        return wrapped(f"{head} ", text, width)
    lines = wrapped(f"{head} ", finding.title, width)
    lines[0] = lines[0].replace(finding.title, paint(finding.title, BOLD, colour))
    lines += wrapped(f"{MARGIN}seen: ", finding.seen, width)
    lines += wrapped(f"{MARGIN}why:  ", finding.why, width)
    # never wrapped: these lines are to be copied
    lines += [f"{MARGIN}{'cure: ' if i == 0 else '      '}{line}" for i, line in enumerate(finding.cure.splitlines())]
    return [*lines, f"{MARGIN}id:   {finding.id}"]


def wrapped(first: str, text: str, width: int) -> list[str]:
    indent = len(MARGIN) if first.lstrip().startswith(("ok", "\x1b", "warning", "error")) else len(first)
    room = max(width - indent, 30)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
    return [first + lines[0], *(" " * indent + line for line in lines[1:])]


def summary(findings: Sequence[Finding]) -> str:
    counts = as_json(findings)["counts"]
    text = ", ".join(f"{count} {level}{'s' if level != 'ok' and count != 1 else ''}" for level, count in counts.items())
    first = next((finding for finding in findings if finding.level == "error"), None)
    return f"{text}. First: {first.title}" if first else f"{text}. Nothing here stops a training run"
