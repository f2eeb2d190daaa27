"""Checks of the GPUs' present state: compute mode, other processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from commons.doctor.findings import Finding, error, ok, warning
from commons.doctor.machine import Machine
from commons.doctor.smi import Gpu, GpuProcess, gpu_processes, smi
from commons.doctor.visible_devices import visible_gpus

BUSY_MEMORY_FRACTION = 0.2  # a desktop on the same card takes less


def compute_mode(machine: Machine) -> Iterator[Finding]:
    gpus = smi(machine).gpus
    for gpu in gpus:
        cure = f"sudo nvidia-smi -i {gpu.index} -c DEFAULT"
        if gpu.compute_mode == "Prohibited":
            yield error(
                "prohibited",
                f"GPU {gpu.index} refuses every program",
                seen="compute mode Prohibited",
                why="CUDA reports that all devices are busy or unavailable.",
                cure=cure,
            )
        elif gpu.compute_mode and gpu.compute_mode.startswith("Exclusive"):
            yield warning(
                "exclusive",
                f"GPU {gpu.index} accepts one process only",
                seen=f"compute mode {gpu.compute_mode}",
                why="Training fails with 'devices are busy or unavailable' while any other process is on this GPU.",
                cure=cure,
            )
    if gpus and all(gpu.compute_mode in ("Default", None) for gpu in gpus):
        yield ok("several processes may share a GPU", "compute mode Default")


def gpu_use(machine: Machine) -> Iterator[Finding]:
    """Of the GPUs that CUDA_VISIBLE_DEVICES leaves to a run, those that others use."""
    gpus = smi(machine).gpus
    if not gpus:
        return
    own = {os.getpid(), os.getppid()}
    processes = [process for process in gpu_processes(machine) if process.pid not in own]
    idle = [gpu for gpu in gpus if not is_used(gpu, processes)]
    busy = [gpu for gpu in visible_gpus(machine) if gpu not in idle]
    for gpu in busy:
        here = [process for process in processes if process.gpu_uuid == gpu.uuid]
        names = ", ".join(f"{process.name} (process {process.pid})" for process in here)
        yield warning(
            "busy",
            f"GPU {gpu.index} is used by others",
            seen=f"{gpu.memory_used_mib or 0:.0f} of {gpu.memory_total_mib or 0:.0f} MiB taken"
            + (f" by {names}" if names else ""),
            why="Less memory is left ('CUDA out of memory') and measured times mean little.",
            cure="\n".join([*other_gpus(machine, idle, gpu), whose(here)]),
        )
    if not busy:
        yield ok("no other process uses the GPUs")


def is_used(gpu: Gpu, processes: Sequence[GpuProcess]) -> bool:
    used, total = gpu.memory_used_mib or 0.0, gpu.memory_total_mib or 0.0
    taken = bool(total) and used > BUSY_MEMORY_FRACTION * total
    return taken or any(process.gpu_uuid == gpu.uuid for process in processes)


def whose(processes: Sequence[GpuProcess]) -> str:
    if not processes:  # of another container or of Windows
        return "nvidia-smi   # wait until its memory is free"
    return f"ps -fp {','.join(str(process.pid) for process in processes)}   # whose are they? stop them, or wait"


def other_gpus(machine: Machine, idle: Sequence[Gpu], busy: Gpu) -> list[str]:
    """The command that uses the idle GPUs; where there are none, the GPU with the most free memory."""
    gpus = smi(machine).gpus
    most_free = max(gpus, key=lambda gpu: (gpu.memory_total_mib or 0.0) - (gpu.memory_used_mib or 0.0))
    chosen = idle or [most_free]
    if busy in chosen:
        return []
    note = "the idle ones" if len(idle) > 1 else "it is idle" if idle else "the one with the most free memory"
    # CUDA counts the fastest card first, nvidia-smi by place: the numbers are the same only among equal cards
    order = "" if len({gpu.name for gpu in gpus}) == 1 else "CUDA_DEVICE_ORDER=PCI_BUS_ID "
    return [f"export {order}CUDA_VISIBLE_DEVICES={','.join(str(gpu.index) for gpu in chosen)}   # {note}"]
