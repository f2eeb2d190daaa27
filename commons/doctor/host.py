"""Checks of the host: memory, control groups, /dev/shm, locked memory, open files, disks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from commons.doctor.findings import Finding, error, ok, warning
from commons.doctor.machine import Machine

GIB = 1 << 30
# gpt2_medium with all offloaded: 355 M parameters of 16 bytes (weights, gradients, Adam's states), and Python
COMFORTABLE_MEMORY_BYTES = 8 * GIB
COMFORTABLE_SHM_BYTES = 1 * GIB
COMFORTABLE_DISK_BYTES = 5 * GIB
SMALLEST_DISK_BYTES = GIB // 4
FEWEST_OPEN_FILES = 1024
FEWEST_PROCESSES = 512
UNLIMITED = 1 << 60  # control groups of version 1 print a number near 2^63


@dataclass(frozen=True)
class ControlGroup:
    """The tightest limits on the way from this process's control group to the root; None is unlimited."""

    version: int
    memory_bytes: int | None = None
    memory_used_bytes: int | None = None
    cpus: float | None = None
    processes: int | None = None
    oom_kills: int = 0


def gib(value: float) -> str:
    return f"{value / GIB:.1f} GiB"


# --- control groups


def control_group(machine: Machine) -> ControlGroup | None:
    return machine.remember("control_group", read_control_group)


def read_control_group(machine: Machine) -> ControlGroup | None:
    """https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/memory.html for version 1."""
    paths = {
        line.split(":")[1]: line.split(":", 2)[2]
        for line in (machine.read("/proc/self/cgroup") or "").splitlines()
        if line.count(":") >= 2
    }
    if machine.exists("/sys/fs/cgroup/cgroup.controllers"):
        return version_2(machine, folders("/sys/fs/cgroup", paths.get("", "/")))
    controllers = {name: path for names, path in paths.items() for name in names.split(",")}
    if "memory" not in controllers:
        return None
    return version_1(machine, controllers)


def folders(mount: str, path: str) -> list[str]:
    """The group's folder and those above it. In a container it may be the host's: then the root is there."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return [mount + "".join(f"/{part}" for part in parts[:depth]) for depth in range(len(parts), -1, -1)]


def smallest(values: list[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def read_number(machine: Machine, path: str) -> int | None:
    text = (machine.read(path) or "").strip()
    return int(text) if text.isdecimal() and int(text) < UNLIMITED else None


def read_counter(machine: Machine, path: str, name: str) -> int:
    match = re.search(rf"^{name} (\d+)$", machine.read(path) or "", re.MULTILINE)
    return int(match[1]) if match else 0


def whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def version_2(machine: Machine, places: list[str]) -> ControlGroup:
    limited = next((place for place in places if read_number(machine, f"{place}/memory.max") is not None), places[0])
    return ControlGroup(
        2,
        whole(smallest([read_number(machine, f"{place}/memory.max") for place in places])),
        read_number(machine, f"{limited}/memory.current"),
        smallest([cpu_quota(machine.read(f"{place}/cpu.max") or "") for place in places]),
        whole(smallest([read_number(machine, f"{place}/pids.max") for place in places])),
        read_counter(machine, f"{places[0]}/memory.events", "oom_kill"),
    )


def cpu_quota(text: str) -> float | None:
    """cpu.max: "<microseconds> <of each period>", or "max <period>"."""
    parts = text.split()
    return int(parts[0]) / int(parts[1]) if len(parts) == 2 and parts[0].isdecimal() else None


def version_1(machine: Machine, controllers: dict[str, str]) -> ControlGroup:
    def places(name: str) -> list[str]:
        return folders(f"/sys/fs/cgroup/{name}", controllers.get(name, "/"))

    quotas = []
    for place in places("cpu"):
        quota, period = (read_number(machine, f"{place}/cpu.cfs_{part}_us") for part in ("quota", "period"))
        quotas.append(quota / period if quota and period else None)
    memory = places("memory")
    limited = next((each for each in memory if read_number(machine, f"{each}/memory.limit_in_bytes")), memory[0])
    return ControlGroup(
        1,
        whole(smallest([read_number(machine, f"{place}/memory.limit_in_bytes") for place in memory])),
        read_number(machine, f"{limited}/memory.usage_in_bytes"),
        smallest(quotas),
        whole(smallest([read_number(machine, f"{place}/pids.max") for place in places("pids")])),
        read_counter(machine, f"{memory[0]}/memory.oom_control", "oom_kill"),
    )


def cgroup(machine: Machine) -> Iterator[Finding]:
    group = control_group(machine)
    if group is None:
        yield ok("no control group limits")
        return
    limits = {
        "memory": gib(group.memory_bytes) if group.memory_bytes is not None else None,
        "CPUs": f"{group.cpus:g}" if group.cpus is not None else None,
        "processes": str(group.processes) if group.processes is not None else None,
    }
    seen = ", ".join(f"{name} {value}" for name, value in limits.items() if value) or "no limit"
    few = group.processes is not None and group.processes < FEWEST_PROCESSES
    if few:
        yield warning(
            "few-processes",
            f"only {group.processes} processes and threads are allowed",
            seen=f"control group version {group.version}: {seen}",
            why="Each rank starts dozens of threads: 'can't start new thread'.",
            cure="docker run --pids-limit -1 ...   # or ask for a larger limit",
        )
    if group.oom_kills:
        yield warning(
            "oom-kills",
            f"the kernel has killed {group.oom_kills} process(es) here for lack of memory",
            seen=f"control group version {group.version}: {seen}",
            why="This is how a rank dies with signal 9 and no message (exit code 137).",
            cure=more_memory(machine),
        )
    if not few and not group.oom_kills:
        yield ok("control group limits leave room", f"version {group.version}: {seen}")


# --- memory


def more_memory(machine: Machine) -> str:
    if machine.wsl == 2 and not machine.container:
        return (
            'cmd.exe /c "notepad %UserProfile%\\.wslconfig"   # write below [wsl2]: memory=24GB (the default is half'
            " the machine's)\n"
            "wsl.exe --shutdown   # in PowerShell; then open WSL again"
        )
    if machine.container:
        return "docker run --memory=32g --memory-swap=32g ...   # or the pod's or job's memory limit"
    if "SLURM_JOB_ID" in machine.environment:
        return "sbatch --mem=64G ..."
    return "bash run_gemini.sh --batch_size 4 --offload_optim_frac 0   # or a smaller --model_type"


def memory(machine: Machine) -> Iterator[Finding]:
    """What training may take: the kernel's available memory, or what the control group leaves."""
    rows = re.findall(r"^(\w+):\s+(\d+) kB", machine.read("/proc/meminfo") or "", re.MULTILINE)
    sizes = {name: int(value) * 1024 for name, value in rows}
    if "MemTotal" not in sizes:
        return
    free = sizes.get("MemAvailable", sizes["MemTotal"])
    seen = f"{gib(free)} of {gib(sizes['MemTotal'])} free, swap {gib(sizes.get('SwapFree', 0))}"
    group = control_group(machine)
    if group and group.memory_bytes is not None:
        left = group.memory_bytes - (group.memory_used_bytes or 0)
        if left < free:
            free, seen = (
                left,
                f"{seen}; the control group allows {gib(group.memory_bytes)}, {gib(left)} are left",
            )
    if free >= COMFORTABLE_MEMORY_BYTES:
        yield ok(f"{gib(free)} of host memory are free", seen)
        return
    yield warning(
        "little",
        f"only {gib(free)} of host memory are free",
        seen=seen,
        why="Offloaded parameters and optimizer states lie there, 16 bytes a parameter (gpt2_medium: 5.7 GB);"
        " a process that takes too much is killed without a message (signal 9, exit code 137).",
        cure=more_memory(machine),
    )


def shm(machine: Machine) -> Iterator[Finding]:
    disk = machine.disk("/dev/shm")
    size = "8g" if machine.container == "docker" else "8G"
    cure = (
        f"docker run --shm-size={size} ...   # or: --ipc=host"
        if machine.container
        else f"sudo mount -o remount,size={size} /dev/shm"
    )
    if disk is None or not disk.writable:
        yield error(
            "unusable",
            "/dev/shm cannot be written to",
            seen="it is not there" if disk is None else "no permission to write",
            why="Processes of one machine exchange data there: gloo, NCCL and data loaders.",
            cure=cure if machine.container else "sudo mount -t tmpfs -o mode=1777 tmpfs /dev/shm",
        )
    elif disk.free_bytes < COMFORTABLE_SHM_BYTES:
        yield warning(
            "small",
            f"/dev/shm has only {disk.free_bytes / (1 << 20):.0f} MiB free",
            seen=f"{gib(disk.total_bytes)} in all; docker gives a container 64 MiB unless told otherwise",
            why="NCCL and data loaders share memory there: 'Bus error', or 'No space left on device' from NCCL.",
            cure=cure,
        )
    else:
        yield ok(f"/dev/shm has {gib(disk.free_bytes)} free")


def memlock(machine: Machine) -> Iterator[Finding]:
    """Matters to InfiniBand alone: CUDA's own pinned memory does not count against the limit."""
    soft, hard = machine.limit("memlock")
    text = "unlimited" if soft is None else f"{soft / 1024:.0f} KiB"
    cards = machine.glob("/sys/class/infiniband/*")
    if soft is None or not cards:
        yield ok(f"locked memory: {text}", "" if cards else "no InfiniBand here, which alone would need more")
        return
    yield warning(
        "small",
        "locked memory is limited and there is InfiniBand",
        seen=f"ulimit -l: {text}, at most {'unlimited' if hard is None else f'{hard / 1024:.0f} KiB'};"
        f" {', '.join(cards)}",
        why="NCCL registers its buffers with the network card: 'ibv_reg_mr failed', 'Cannot allocate memory'.",
        cure="docker run --ulimit memlock=-1 ..."
        if machine.container
        else 'echo "* - memlock unlimited" | sudo tee /etc/security/limits.d/memlock.conf   # then log in again',
    )


def open_files(machine: Machine) -> Iterator[Finding]:
    soft, hard = machine.limit("nofile")
    if soft is None or soft >= FEWEST_OPEN_FILES:
        yield ok(f"open files: {'unlimited' if soft is None else soft}")
        return
    yield warning(
        "few",
        f"only {soft} open files are allowed",
        seen=f"ulimit -n: {soft}, at most {'unlimited' if hard is None else hard}",
        why="Sockets between ranks, logs and checkpoints add up: 'Too many open files'.",
        cure=f"ulimit -n {65536 if hard is None else min(hard, 65536)}",
    )


# --- disks


def disk(machine: Machine) -> Iterator[Finding]:
    """The working folder (logs, checkpoints) and the temporary one (torch.compile, meeting files)."""
    places = {machine.working_folder: "logs and checkpoints", machine.temporary_folder: "temporary files"}
    good = []
    for path, use in places.items():
        found = machine.disk(path)
        if found is None or not found.writable:
            yield error(
                "not-writable",
                f"{path} cannot be written to",
                seen="it is not there" if found is None else "no permission, or a read-only file system",
                why=f"It is where {use} go.",
                cure="export TMPDIR=$HOME/tmp && mkdir -p $TMPDIR"
                if use == "temporary files"
                else "bash run_gemini.sh --log_dir $HOME/gemini_logs",
            )
        elif found.free_bytes < COMFORTABLE_DISK_BYTES:
            finding = error if found.free_bytes < SMALLEST_DISK_BYTES else warning
            yield finding(
                "full",
                f"{path} has only {gib(found.free_bytes)} free",
                seen=f"{gib(found.total_bytes)} in all",
                why=f"It is where {use} go; a run ends when it is full ('No space left on device').",
                cure=f"du -xh -d 1 {path} | sort -h | tail   # what takes the space",
            )
        else:
            good.append(f"{path} {gib(found.free_bytes)}")
    if len(good) == len(places):
        yield ok("disk space", ", ".join(good) + " free")


def cpus(machine: Machine) -> Iterator[Finding]:
    group = control_group(machine)
    usable = float(machine.cpus)
    if group and group.cpus is not None:
        usable = min(usable, group.cpus)
    gpus = len(machine.libcuda.devices)
    if usable < max(1, gpus):
        yield warning(
            "few",
            f"only {usable:g} CPU cores for {max(1, gpus)} process(es)",
            seen=f"{machine.cpus} cores, of which the control group allows {usable:g}",
            why="Each GPU needs a core to feed it; with offloading the optimizer itself runs on the CPU.",
            cure="docker run --cpus=16 ..."
            if machine.container
            else "sbatch --cpus-per-task=8 ...   # or the job's limit",
        )
    else:
        yield ok(f"{usable:g} CPU cores")
