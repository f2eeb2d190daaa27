"""Child processes that always end: programs with a time limit, and probes.py, which answers in JSON."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PROBES = Path(__file__).with_name("probes.py")


@dataclass(frozen=True)
class Completed:
    """What became of a program. returncode is None where it did not start or did not end in time."""

    returncode: int | None
    stdout: str = ""
    stderr: str = ""
    missing: bool = False
    timed_out: bool = False

    @property
    def text(self) -> str:
        return f"{self.stdout.strip()}\n{self.stderr.strip()}".strip()


def probe_command(*arguments: str) -> list[str]:
    """A child of the same interpreter with the same view of installed packages."""
    flags = {"-I": sys.flags.isolated, "-S": sys.flags.no_site, "-s": sys.flags.no_user_site}
    return [sys.executable, *(flag for flag, given in flags.items() if given), str(PROBES), *arguments]


def run_process(command: Sequence[str], environment: Mapping[str, str], timeout_seconds: float) -> Completed:
    try:
        done = subprocess.run(
            command,
            env=dict(environment),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        return Completed(None, as_text(expired.stdout), as_text(expired.stderr), timed_out=True)
    except OSError as problem:
        return Completed(None, stderr=str(problem))
    return Completed(done.returncode, done.stdout, done.stderr)


def as_text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def probe_answer(done: Completed, timeout_seconds: float) -> dict[str, Any]:
    if done.timed_out:
        return {"error": f"no answer in {timeout_seconds:g} s", "timed_out": True}
    if done.returncode is not None and done.returncode < 0:
        return {"error": f"ended by signal {-done.returncode}; {last_line(done.stderr)}"}
    for line in reversed(done.stdout.splitlines()):  # libraries may have printed before
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                return json.loads(line)
    return {"error": last_line(done.stderr) or f"exit code {done.returncode}, no answer"}
