"""What memory this machine's control group and kernel allow, and how many processes they have killed for it.

Files are read through a function, so that a made-up machine can answer (commons.doctor.machine).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
UNLIMITED = 1 << 60  # control groups of version 1 print a number near 2^63
# version of control groups -> its files: the limit, what is used, the counters
MEMORY_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control"),
    2: ("memory.max", "memory.current", "memory.events"),
}

Read = Callable[[str], str | None]


def read_file(path: str) -> str | None:
    """A file's text, or None where it is not there or not readable."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None


@dataclass(frozen=True)
class ControlGroup:
    """The tightest memory limit on the way from this process's control group to the root; None is unlimited.

    limit_file: where that limit stands; used_bytes: of its group; oom_kills: in this process's own group.
    """

    version: int
    limit_bytes: int | None = None
    limit_file: str = ""
    used_bytes: int = 0
    oom_kills: int = 0


def control_group(read: Read = read_file) -> ControlGroup | None:
    """https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/memory.html for version 1."""
    found = _version_and_folders(read)
    return None if found is None else _read_group(read, *found)


def _version_and_folders(read: Read) -> tuple[int, list[str]] | None:
    rows = [line.split(":", 2) for line in (read("/proc/self/cgroup") or "").splitlines()]
    paths = {name: row[2] for row in rows if len(row) == 3 for name in row[1].split(",")}
    if read("/sys/fs/cgroup/cgroup.controllers") is not None:
        return 2, _folders("/sys/fs/cgroup", paths.get("", "/"))
    if "memory" in paths:
        return 1, _folders("/sys/fs/cgroup/memory", paths["memory"])
    return None


def _folders(mount: str, path: str) -> list[str]:
    """The group's folder and those above it. In a container the path may be the host's: its own group is the root."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return [mount + "".join(f"/{part}" for part in parts[:depth]) for depth in range(len(parts), -1, -1)]


def _read_group(read: Read, version: int, places: list[str]) -> ControlGroup:
    limit_name, used_name, _ = MEMORY_FILES[version]
    limits = {place: _read_number(read, f"{place}/{limit_name}") for place in places}
    kills = _counted_kills(read(f"{places[0]}/{MEMORY_FILES[version][2]}")) or 0
    limit, place = min(((limit, place) for place, limit in limits.items() if limit is not None), default=(None, ""))
    if limit is None:
        return ControlGroup(version, oom_kills=kills)
    used = _read_number(read, f"{place}/{used_name}") or 0
    return ControlGroup(version, limit, f"{place}/{limit_name}", used, kills)


def _read_number(read: Read, path: str) -> int | None:
    text = (read(path) or "").strip()
    return int(text) if text.isdecimal() and int(text) < UNLIMITED else None


def memory_sizes(read: Read = read_file) -> dict[str, int]:
    """/proc/meminfo, in bytes; in a container that of its host."""
    rows = re.findall(r"^(\w+):\s+(\d+) kB", read("/proc/meminfo") or "", re.MULTILINE)
    return {name: int(value) * 1024 for name, value in rows}


def oom_kills(read: Read = read_file) -> int:
    """Processes that the kernel has killed for lack of memory so far: in this process's control group, or where that
    counts none, on this machine (since Linux 4.13).
    """
    found = _version_and_folders(read)
    counters = [] if found is None else [f"{found[1][0]}/{MEMORY_FILES[found[0]][2]}"]
    counted = (_counted_kills(read(path)) for path in (*counters, "/proc/vmstat"))
    return next((kills for kills in counted if kills is not None), 0)


def _counted_kills(counters: str | None) -> int | None:
    """Of a file of counters, a name and a number a line."""
    found = re.search(r"^oom_kill (\d+)$", counters or "", re.MULTILINE)
    return int(found[1]) if found else None
