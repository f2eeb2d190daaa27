"""Words of the messages about settings that more than one check needs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(value: str, names: Iterable[str]) -> str:
    """The way out of a name that does not exist: the ones most like it, or all."""
    names = list(names)
    lower = {name.lower(): name for name in names}
    close = [lower[match] for match in difflib.get_close_matches(value.lower(), lower, n=3, cutoff=0.5)]
    return f"did you mean {either(close)}?" if close else f"use {either(names)}"


def unknown(name: str, value: str, names: Iterable[str]) -> str:
    """The problem line of a flag whose value is not one of ``names``."""
    return f"--{name} {value!r} does not exist: {nearest(value, names)}"


def either(names: Iterable[Any]) -> str:
    *rest, last = [str(name) for name in names]
    return f"{', '.join(rest)} or {last}" if rest else last


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
