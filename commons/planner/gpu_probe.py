"""The GPUs at hand, asked by a process of its own: asking how much memory is free makes a context on every GPU, which
the launcher would keep while its ranks train.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from commons.lifecycle.suite_root import SUITE_ROOT
from commons.planner.gpus import GpuModel
from commons.planner.room import Room, find_room

PROBE_SECONDS = 120.0
MODULE = "commons.planner.gpu_probe"


def rooms_in_a_child(ranks: int) -> list[tuple[GpuModel, int]]:
    """Each rank's GPU, and the bytes that are free on it.

    Raises:
        RuntimeError: the GPUs cannot be asked; the text has the child's last line.
    """
    command = [sys.executable, "-m", MODULE, str(ranks)]
    done = subprocess.run(
        command, cwd=SUITE_ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_SECONDS
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"the GPUs of this machine cannot be asked for their memory: {lines[-1]}")
    return [_read(gpu) for gpu in json.loads(done.stdout.splitlines()[-1])]


def _read(gpu: Mapping[str, Any]) -> tuple[GpuModel, int]:
    major, minor = gpu["capability"]
    return GpuModel(gpu["name"], gpu["memory_bytes"], (major, minor), gpu["device_name"]), gpu["free"]


def told(ranks: int, find: Callable[[bool, int], Room] = find_room) -> str:
    """What the child prints: a JSON list."""
    rooms = [find(True, index) for index in range(ranks)]
    return json.dumps([{**vars(room.gpu), "free": room.device} for room in rooms])


if __name__ == "__main__":
    print(told(int(sys.argv[1])))
