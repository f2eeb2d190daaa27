"""What is free on a machine: its own memory, control groups, and what they count that can be dropped."""

from __future__ import annotations

from pathlib import Path

import pytest

from commons.doctor.machine import Machine
from commons.planner.room import find_room, host_room

GIB = 1 << 30
MEMINFO = f"MemTotal: {64 * GIB // 1024} kB\nMemAvailable: {48 * GIB // 1024} kB\n"


def machine(root: Path, **files: str) -> Machine:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMINFO)
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(root=root, environment={})


def test_without_limits_what_the_kernel_calls_available(tmp_path: Path) -> None:
    assert host_room(machine(tmp_path)) == (48 * GIB, "free memory of this machine")


@pytest.mark.parametrize("dropped, left", [(0, 4), (3, 7)])
def test_a_control_group_is_a_limit_and_its_cached_files_are_not_in_the_way(
    tmp_path: Path, dropped: int, left: int
) -> None:
    group = "sys__fs__cgroup__job"
    files = {
        "sys__fs__cgroup__cgroup.controllers": "memory",
        "proc__self__cgroup": "0::/job",
        f"{group}__memory.max": str(10 * GIB),
        f"{group}__memory.current": str(6 * GIB),
        f"{group}__memory.stat": f"anon 1\ninactive_file {dropped * GIB}\n",
    }
    free, limit = host_room(machine(tmp_path, **files))
    assert free == left * GIB and "control group's limit" in limit and "/job/memory.max" in limit


def test_this_machine_has_room_and_no_gpu_is_asked_for_a_cpu_rank() -> None:
    room = find_room(on_gpu=False)
    assert room.host > 0 and room.device is None and room.gpu is None
