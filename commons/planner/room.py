"""The memory that a launch finds free on this machine: other processes, control groups and limits counted."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from commons.doctor.host import control_group, memory_sizes
from commons.doctor.machine import Machine
from commons.ops import capability
from commons.planner.gpus import GPU_MODELS, GpuModel


@dataclass(frozen=True)
class Room:
    """What one rank finds, in bytes.

    Attributes:
        gpu: its own; None for a rank on the CPU.
        device: free there, as this process may use it; what its own context takes is not in it.
        host: free for all ranks of this machine together, and ``host_limit``, what says so.
        shared_memory: free in /dev/shm.
        memlock: what one process may lock; None: any amount.
        node: which machine it is, of the job's.
        resident: what this process has of the host's memory already, and so is not in ``host``.
    """

    gpu: GpuModel | None
    device: int | None
    host: int
    host_limit: str
    shared_memory: int | None
    memlock: int | None
    node: int = 0
    resident: int = 0


def find_room(on_gpu: bool, local_rank: int = 0, node: int = 0, machine: Machine | None = None) -> Room:
    """Look. On a GPU this makes the process's context there, which the run needs anyway."""
    machine = machine or Machine()
    host, limit = host_room(machine)
    disk = machine.disk("/dev/shm")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Room(
        gpu=gpu_here(local_rank) if on_gpu else None,
        device=_device_room(local_rank) if on_gpu else None,
        host=host,
        host_limit=limit,
        shared_memory=None if disk is None else disk.free_bytes,
        memlock=None if soft == resource.RLIM_INFINITY else soft,
        node=node,
        resident=_resident(machine),
    )


def _resident(machine: Machine) -> int:
    fields = (machine.read("/proc/self/statm") or "").split()
    return int(fields[1]) * resource.getpagesize() if len(fields) > 1 else 0


def host_room(machine: Machine) -> tuple[int, str]:
    """Bytes of host memory that are left, and what sets that limit."""
    sizes = memory_sizes(machine)
    free = sizes.get("MemAvailable", sizes.get("MemTotal", 1 << 62))
    limit = "free memory of this machine"
    group = control_group(machine)
    if group is not None and group.limit_bytes is not None:
        left = group.limit_bytes - group.used_bytes + _reclaimable(machine, group.limit_file)
        if left < free:
            free, limit = left, f"the control group's limit ({group.limit_file})"
    return max(0, free), limit


def _reclaimable(machine: Machine, limit_file: str) -> int:
    """Of a group's use, files that the kernel drops when memory is wanted."""
    folder = limit_file.rpartition("/")[0]
    rows = [line.split() for line in (machine.read(f"{folder}/memory.stat") or "").splitlines()]
    counters = {row[0]: int(row[1]) for row in rows if len(row) == 2 and row[1].isdecimal()}
    return counters.get("inactive_file", counters.get("total_inactive_file", 0))


def gpu_here(index: int = 0) -> GpuModel:
    """The GPU as torch sees it, whether or not the table knows it."""
    import torch

    seen = torch.cuda.get_device_properties(index)
    known = next((model.name for model in GPU_MODELS.values() if model.device_name == seen.name), seen.name)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(index)
    age = capability.gpu_capability(index) or (seen.major, seen.minor)
    return GpuModel(known, int(seen.total_memory * share), age, seen.name)


def _device_room(index: int) -> int:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    free += torch.cuda.memory_reserved(index)
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch 2.8 on
    return min(free, int(total * share(index))) if share is not None else free
