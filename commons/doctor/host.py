"""Checks of the host: memory, the control group's limit of it, /dev/shm."""

from __future__ import annotations

import math
from collections.abc import Iterator

from commons.doctor.findings import Finding, ok, warning
from commons.doctor.machine import Machine
from commons.lifecycle import host_memory
from commons.lifecycle.host_memory import GIB, ControlGroup

# gpt2_medium with all offloaded: 355 M parameters of 16 bytes (weights, gradients, Adam's states), and Python
COMFORTABLE_MEMORY_BYTES = 8 * GIB
COMFORTABLE_SHM_BYTES = 1 * GIB
WORTHWHILE = 1.1  # a limit raised by less is not worth a new start


def gib(value: float) -> str:
    return f"{value / GIB:.1f} GiB"


# --- control groups


def control_group(machine: Machine) -> ControlGroup | None:
    return host_memory.control_group(machine.read)


def cgroup(machine: Machine) -> Iterator[Finding]:
    group = control_group(machine)
    if group is None:
        yield ok("no control group limits memory")
        return
    limit = "no limit of memory" if group.limit_bytes is None else f"memory {gib(group.limit_bytes)}"
    seen = f"control group version {group.version}: {limit}"
    if group.oom_kills:
        yield warning(
            "oom-kills",
            f"the kernel has killed {group.oom_kills} process(es) here for lack of memory",
            seen=seen,
            why="This is how a rank dies with signal 9 and no message (exit code 137).",
            cure=more_memory(machine),
        )
    else:
        yield ok("no process was killed for lack of memory", seen)


# --- memory


def memory_sizes(machine: Machine) -> dict[str, int]:
    """/proc/meminfo, in bytes; in a container that of its host."""
    return host_memory.memory_sizes(machine.read)


def memory(machine: Machine) -> Iterator[Finding]:
    """What training may take: the kernel's available memory, or what the control group leaves."""
    sizes = memory_sizes(machine)
    if "MemTotal" not in sizes:
        return
    free = sizes.get("MemAvailable", sizes["MemTotal"])
    seen = f"{gib(free)} of {gib(sizes['MemTotal'])} free, swap {gib(sizes.get('SwapFree', 0))}"
    group = control_group(machine)
    if group and group.limit_bytes is not None:
        left = group.limit_bytes - group.used_bytes
        if left < free:
            free = left
            seen += f"; the control group allows {gib(group.limit_bytes)}, {gib(left)} are left"
    if free >= COMFORTABLE_MEMORY_BYTES:
        yield ok(f"{gib(free)} of host memory are free", seen)
        return
    yield warning(
        "little",
        f"only {gib(free)} of host memory are free",
        seen=seen,
        why="Offloaded parameters and optimizer states lie there, 16 bytes per parameter (gpt2_medium: 5.7 GB);"
        " a process that takes too much is killed without a message (signal 9, exit code 137).",
        cure=more_memory(machine),
    )


TAKE_LESS = (
    "ps -eo rss,pid,user,args --sort=-rss | head   # which processes take the memory\n"
    "bash run_gemini.sh --batch_size 1   # and a smaller --model_type, or less offloading"
)


def more_memory(machine: Machine) -> str:
    """The command that gives a run more host memory than it has now; where there is no more, how to take less."""
    total, limit = memory_sizes(machine).get("MemTotal", 0), memory_limit(machine)
    most = total // GIB
    if limit is not None and limit * WORTHWHILE < most * GIB:
        size = math.ceil(max(2 * limit, COMFORTABLE_MEMORY_BYTES) / GIB)
        return raise_limit(machine, min(size, most), all_of_it=size >= most)
    if machine.wsl == 2:  # which by default has half of the machine's memory: three quarters leave room for Windows
        size = math.ceil(max(1.5 * total, COMFORTABLE_MEMORY_BYTES) / GIB)
        return (
            f'cmd.exe /c "notepad %UserProfile%\\.wslconfig"   # write below [wsl2]: memory={size}GB (now'
            f" {gib(total)}; no more than the machine has)\n"
            "wsl.exe --shutdown   # in PowerShell; then open WSL again"
        )
    return TAKE_LESS


def memory_limit(machine: Machine) -> int | None:
    """Bytes of host memory that a run may take here, by the control group or by Slurm; None where nothing limits it."""
    group = control_group(machine)
    if group and group.limit_bytes is not None:
        return group.limit_bytes
    megabytes = machine.environment.get("SLURM_MEM_PER_NODE", "")
    return int(megabytes) << 20 if megabytes.isdecimal() and int(megabytes) else None


def raise_limit(machine: Machine, size: int, *, all_of_it: bool) -> str:
    """size: GiB, more than the present limit and no more than the machine has."""
    if machine.container == "kubernetes":
        return f"kubectl set resources deployment NAME --limits=memory={size}Gi   # or in the pod's own file"
    if machine.engine:
        return f"{machine.engine} run --memory={size}g --memory-swap={size}g ..."
    if "SLURM_JOB_ID" in machine.environment:
        return "sbatch --mem=0 ...   # all of the node's memory" if all_of_it else f"sbatch --mem={size}G ..."
    group = control_group(machine)
    return f"echo {size}G | sudo tee {group.limit_file if group else ''}"


# --- shared memory


def shm(machine: Machine) -> Iterator[Finding]:
    disk = machine.disk("/dev/shm")
    total, free = (disk.total_bytes, disk.free_bytes) if disk else (0, 0)
    if free >= COMFORTABLE_SHM_BYTES:
        yield ok(f"/dev/shm has {gib(free)} free")
        return
    yield warning(
        "small",
        f"/dev/shm has only {free / (1 << 20):.0f} MiB free",
        seen=f"{gib(total)} in all; docker gives a container 64 MiB unless told otherwise",
        why="NCCL and data loaders share memory there: 'Bus error', or 'No space left on device' from NCCL.",
        cure=larger_shm(machine, total),
    )


def larger_shm(machine: Machine, present: int) -> str:
    """The command for a larger /dev/shm; it takes host memory, so half of that is the most that makes sense."""
    size = min(max(2 * present, 8 * GIB), memory_sizes(machine).get("MemTotal", 0) // 2) // GIB
    if size * GIB < max(WORTHWHILE * present, COMFORTABLE_SHM_BYTES):
        return "ls -lS /dev/shm | head   # what fills it: files of runs that were killed may be removed"
    if machine.container == "kubernetes":
        return "kubectl edit deployment NAME   # mount an emptyDir with medium: Memory at /dev/shm"
    if machine.engine:
        return f"{machine.engine} run --shm-size={size}g ...   # or: --ipc=host"
    return f"sudo mount -o remount,size={size}G /dev/shm"
