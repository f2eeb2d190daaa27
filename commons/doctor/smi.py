"""nvidia-smi's answers as records. What a driver or a GPU does not know is None."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from commons.doctor.machine import Machine
from commons.doctor.processes import Completed

# A driver reports the newest CUDA that it can run; by branch, for drivers that do not say it.
# https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/ (table of toolkit and driver versions)
CUDA_OF_DRIVER_BRANCH = {
    450: (11, 0), 460: (11, 2), 470: (11, 4), 495: (11, 5), 510: (11, 6), 515: (11, 7), 520: (11, 8),
    525: (12, 0), 530: (12, 1), 535: (12, 2), 545: (12, 3), 550: (12, 4), 555: (12, 5), 560: (12, 6),
    565: (12, 7), 570: (12, 8), 575: (12, 9), 580: (13, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    index: int
    uuid: str
    name: str
    driver_version: str
    memory_total_mib: float | None = None
    memory_used_mib: float | None = None
    capability: tuple[int, int] | None = None
    compute_mode: str | None = None


@dataclass(frozen=True)
class GpuProcess:
    gpu_uuid: str
    pid: int
    name: str


@dataclass(frozen=True)
class Smi:
    """path is None where there is no nvidia-smi; problem is whatever it said besides."""

    path: str | None
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""
    timed_out: bool = False


def known(text: str) -> str | None:
    """None for [N/A], [Not Supported], [Insufficient Permissions], [Unknown Error] and the like."""
    text = text.strip()
    return None if not text or text.startswith("[") or text in ("N/A", "Not Supported", "Not Active") else text


def number(text: str) -> float | None:
    value = known(text)
    return float(value) if value and re.fullmatch(r"-?\d+(\.\d+)?", value) else None


def version(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)\.(\d+).*", text.strip())
    return (int(match[1]), int(match[2])) if match else None


# Gpu's field -> (nvidia-smi's name for it; how to read the answer)
QUERY: dict[str, tuple[str, Callable[[str], Any]]] = {
    "index": ("index", int),
    "uuid": ("uuid", str.strip),
    "name": ("name", str.strip),
    "driver_version": ("driver_version", str.strip),
    "memory_total_mib": ("memory.total", number),
    "memory_used_mib": ("memory.used", number),
    "capability": ("compute_cap", version),
    "compute_mode": ("compute_mode", known),
}
REQUIRED = ("index", "uuid", "name", "driver_version")
CSV = "--format=csv,noheader,nounits"


def query_gpus(machine: Machine) -> Smi:
    """One nvidia-smi call on a driver that knows every field; one more for each that it does not."""
    path = machine.which("nvidia-smi")
    if path is None:
        return Smi(None)
    asked = {field: name for field, (name, _) in QUERY.items()}
    while True:
        done = machine.run(["nvidia-smi", "--query-gpu=" + ",".join(asked.values()), CSV])
        refused = re.search(r'[Ff]ield "([^"]+)" is not a valid field', done.text)
        field = next((f for f, name in asked.items() if refused and name == refused[1]), None)
        if field is None or field in REQUIRED:
            return read_answer(path, list(asked), done)
        del asked[field]


def read_answer(path: str, asked: list[str], done: Completed) -> Smi:
    """Lines that are no rows (a warning about one GPU, say) are the problem; the rows count all the same."""
    if done.timed_out:
        return Smi(path, problem="no answer in time", timed_out=True)
    gpus, other = [], []
    for line in filter(str.strip, done.text.splitlines()):
        values = line.split(",")
        if len(values) == len(asked) and values[0].strip().isdigit():
            gpus.append(Gpu(**{field: QUERY[field][1](value) for field, value in zip(asked, values, strict=True)}))
        else:
            other.append(line.strip())
    if not gpus and not other:
        other.append("No devices were found" if done.returncode == 0 else f"exit code {done.returncode}")
    return Smi(path, tuple(gpus), problem="\n".join(other))


def smi(machine: Machine) -> Smi:
    """query_gpus, asked once per machine."""
    return machine.remember("smi", query_gpus)


def driver_cuda(machine: Machine) -> tuple[int, int] | None:
    """The newest CUDA that the driver runs, by a working libcuda, else nvidia-smi's header, else its branch.

    libcuda comes first because of NVIDIA's forward-compatibility package, and only where it works: a Linux
    driver installed inside WSL has a version of its own, which says nothing.
    """
    if machine.libcuda.init_code == 0 and machine.libcuda.version:
        return machine.libcuda.version
    return machine.remember("driver_cuda", cuda_by_nvidia_smi)


def cuda_by_nvidia_smi(machine: Machine) -> tuple[int, int] | None:
    if not smi(machine).gpus:
        return None
    header = re.search(r"CUDA(?: UMD)? Version\s*:\s*(\d+)\.(\d+)", machine.run(["nvidia-smi"]).stdout)
    if header:
        return int(header[1]), int(header[2])
    branch = int(smi(machine).gpus[0].driver_version.split(".")[0])
    known_branches = [each for each in CUDA_OF_DRIVER_BRANCH if each <= branch]
    return CUDA_OF_DRIVER_BRANCH[max(known_branches)] if known_branches else None


def gpu_processes(machine: Machine) -> list[GpuProcess]:
    done = machine.run(["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name,used_gpu_memory", CSV])
    rows = [line.split(",") for line in done.stdout.splitlines() if line.count(",") >= 3]
    return [
        GpuProcess(row[0].strip(), int(row[1]), ",".join(row[2:-1]).strip()) for row in rows if row[1].strip().isdigit()
    ]
