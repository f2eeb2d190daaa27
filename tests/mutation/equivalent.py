"""Mutants that no test can notice, each with the reason: (module, line before, line after) -> why."""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str], str] = {}
