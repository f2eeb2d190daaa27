"""Checks of the GPUs' present state: throttled clocks, memory errors, other processes, peer access."""

from __future__ import annotations

import os
from collections.abc import Iterator

from commons.doctor.findings import Finding, error, ok, warning
from commons.doctor.machine import Machine
from commons.doctor.smi import Gpu, gpu_processes, smi

# Bits of nvidia-smi's mask that slow a GPU down beyond its normal power management
# https://docs.nvidia.com/deploy/nvml-api/group__nvmlClocksEventReasons.html
THROTTLE_REASONS = {
    0x08: "hardware slowdown (heat, power brake or a power fault)",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake from outside",
}
BUSY_MEMORY_FRACTION = 0.2  # a desktop on the same card takes less


def clocks(machine: Machine) -> Iterator[Finding]:
    gpus = smi(machine).gpus
    slowed = {gpu.index: reasons for gpu in gpus if (reasons := throttle_reasons(gpu))}
    for index, reasons in slowed.items():
        yield warning(
            "throttled",
            f"GPU {index} is slowed down",
            seen=", ".join(reasons),
            why="Every step takes longer, and with several GPUs all wait for this one.",
            cure=f"nvidia-smi -i {index} -q -d PERFORMANCE,TEMPERATURE,POWER   # then cooling or the power supply",
        )
    if gpus and not slowed:
        unknown = all(gpu.throttle_reasons is None for gpu in gpus)
        yield ok("the GPUs do not say whether they are slowed down" if unknown else "no GPU is slowed down")


def throttle_reasons(gpu: Gpu) -> list[str]:
    return [text for bit, text in THROTTLE_REASONS.items() if (gpu.throttle_reasons or 0) & bit]


def ecc(machine: Machine) -> Iterator[Finding]:
    gpus = smi(machine).gpus
    broken = [gpu for gpu in gpus if gpu.ecc_uncorrected]
    for gpu in broken:
        yield error(
            "uncorrected",
            f"GPU {gpu.index} had {gpu.ecc_uncorrected} memory errors that could not be corrected",
            seen=f"since the driver was loaded; {gpu.uuid}",
            why="Values in its memory were wrong; the driver ends processes that meet such a place.",
            cure=f"sudo nvidia-smi -i {gpu.index} --gpu-reset   # with no process on it; if they return,"
            " replace the card",
        )
    if gpus and not broken:
        counted = any(gpu.ecc_uncorrected is not None for gpu in gpus)
        yield ok("no uncorrected memory errors" if counted else "these GPUs do not count memory errors")


def gpu_use(machine: Machine) -> Iterator[Finding]:
    gpus = smi(machine).gpus
    if not gpus:
        return
    own = {os.getpid(), os.getppid()}
    others = [process for process in gpu_processes(machine) if process.pid not in own]
    free = True
    for gpu in gpus:
        here = [process for process in others if process.gpu_uuid == gpu.uuid]
        used, total = gpu.memory_used_mib or 0.0, gpu.memory_total_mib or 0.0
        if here or (total and used > BUSY_MEMORY_FRACTION * total):
            free = False
            names = ", ".join(f"{process.name} (process {process.pid})" for process in here)
            yield warning(
                "busy",
                f"GPU {gpu.index} is used by others",
                seen=f"{used:.0f} of {total:.0f} MiB taken" + (f" by {names}" if names else ""),
                why="Less memory is left ('CUDA out of memory') and measured times mean little.",
                cure=f"ps -fp {','.join(str(process.pid) for process in here)}   # whose are they? or take"
                " another GPU:\n"
                f"export CUDA_VISIBLE_DEVICES={free_gpu(gpus, others)}"
                if here
                else f"export CUDA_VISIBLE_DEVICES={free_gpu(gpus, others)}   # the GPU with the most free memory",
            )
    if free:
        yield ok("no other process uses the GPUs")


def free_gpu(gpus: tuple[Gpu, ...], others: list) -> int:
    """The idle GPU with the most free memory, else the one with the most."""
    taken = {process.gpu_uuid for process in others}

    def rank(gpu: Gpu) -> tuple[bool, float]:
        return gpu.uuid not in taken, (gpu.memory_total_mib or 0.0) - (gpu.memory_used_mib or 0.0)

    return max(gpus, key=rank).index


def peer_access(machine: Machine) -> Iterator[Finding]:
    if len(smi(machine).gpus) < 2 or not machine.torch.peer_access:
        return
    table = machine.torch.peer_access
    missing = [(i, j) for i in range(len(table)) for j in range(i) if not table[i][j]]
    if not missing:
        yield ok("the GPUs reach each other's memory directly", f"{len(table)} GPUs, every pair")
        return
    pairs = ", ".join(f"{j}-{i}" for i, j in missing)
    yield warning(
        "no-peer-access",
        "some GPUs do not reach each other's memory directly",
        seen=f"pairs without peer access: {pairs}",
        why="NCCL then copies through host memory: correct, and slower the more is exchanged.",
        cure="nvidia-smi topo -m   # how they are linked; virtualisation or PCI access control (ACS) may forbid it",
    )
