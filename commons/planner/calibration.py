"""What cannot be counted and was measured: contexts, workspaces, what allocators keep; by GPU, with defaults.

A table for one GPU, driver and torch is a JSON file with these names, see :func:`read`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20


@dataclass(frozen=True)
class Calibration:
    """Bytes, but for shares.

    Attributes:
        context: of one process on a GPU: CUDA, its libraries and their kernels.
        nccl: of one process beside other ranks.
        workspace: of cuBLAS, one for each thread and stream that multiplies.
        slack: what torch's allocator keeps beyond what is used, at least.
        slack_share: the same, of what a step takes beyond what rests.
        process: resident memory of one rank on a host with GPUs before it holds tensors there.
        cpu_process: of one that trains on the CPU.
    """

    context: int = 560 * MIB
    nccl: int = 320 * MIB
    workspace: int = 32 * MIB
    slack: int = 64 * MIB
    slack_share: float = 0.015
    process: int = 2300 * MIB
    cpu_process: int = 430 * MIB


# torch's own choice: 32 MiB on Hopper and newer, 8 MiB and a bit before
OLDER_WORKSPACE = 8519680
HOPPER = (9, 0)


def default_for(capability: tuple[int, int] | None) -> Calibration:
    """What is known of GPUs of one CUDA compute capability; None: an H100."""
    older = capability is not None and capability < HOPPER
    return Calibration(workspace=OLDER_WORKSPACE) if older else Calibration()


def read(path: Path) -> Calibration:
    """A table from a file.

    Raises:
        ValueError: it is none, or has other names.
    """
    try:
        values: Any = json.loads(path.read_text())
        numbers = {name: type(default)(values[name]) for name, default in dataclasses.asdict(Calibration()).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no calibration of this version ({error}): make it again, or remove it") from None
    if any(number < 0 for number in numbers.values()):
        raise ValueError(f"{path} has negative sizes: make it again, or remove it")
    return Calibration(**numbers)
