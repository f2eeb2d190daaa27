"""The check of CUDA_VISIBLE_DEVICES: which GPUs it leaves to CUDA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from commons.doctor.driver import gpus_wanted
from commons.doctor.findings import Finding, error, ok, warning
from commons.doctor.machine import Machine
from commons.doctor.smi import Gpu, smi

HIDDEN = {
    "hidden": "hides every GPU",
    "out-of-range": "names a GPU that is not there",
    "unknown-uuid": "names a UUID that no GPU here has",
    "duplicate": "names a GPU twice",
    "malformed": "is not a list of GPU numbers or UUIDs",
}


def read_visible_devices(value: str, count: int, uuids: Sequence[str]) -> tuple[list[str], str, str]:
    """The entries that CUDA uses, why it stops reading (a key of HIDDEN) and at which entry; empty where it does not.

    https://docs.nvidia.com/cuda/cuda-programming-guide/05-appendices/environment-variables.html
    count: the GPUs of this machine; uuids: theirs, empty where unknown. MIG devices are taken as they are named.
    A repeated entry leaves nothing, as torch reads it (torch.cuda.device_count).
    """
    entries: list[str] = []
    for entry in (part.strip() for part in value.split(",")):
        cause = entry_problem(entry, count, uuids)
        if not cause and entry in entries:
            return [], "duplicate", entry
        if cause:
            return entries, cause, entry
        entries.append(entry)
    return entries, "", ""


def entry_problem(entry: str, count: int, uuids: Sequence[str]) -> str:
    if not entry or entry.startswith("-") or entry == "NoDevFiles":
        return "hidden"
    if entry.startswith("MIG-"):
        return ""
    if entry.startswith("GPU-"):
        matches = [uuid for uuid in uuids if uuid.startswith(entry)]
        return "unknown-uuid" if uuids and len(matches) != 1 else ""
    if not entry.isdecimal():
        return "malformed"
    return "out-of-range" if int(entry) >= count else ""


def visible_devices(machine: Machine) -> Iterator[Finding]:
    value = machine.environment.get("CUDA_VISIBLE_DEVICES")
    gpus = smi(machine).gpus
    count = len(gpus) or len(machine.libcuda.devices)
    if value is None or not count:
        yield ok(
            "CUDA_VISIBLE_DEVICES is not set" if value is None else f'CUDA_VISIBLE_DEVICES="{value}", no GPU to hide'
        )
        return
    uuids = [gpu.uuid for gpu in gpus]
    entries, cause, culprit = read_visible_devices(value, count, uuids)
    if not cause:
        yield ok(f"CUDA_VISIBLE_DEVICES={value}", f"{len(entries)} of {count} GPUs are used")
        return
    there = ", ".join(uuids) if cause == "unknown-uuid" else f"0 to {count - 1}" if count > 1 else "0"
    finding = warning if entries else error
    yield finding(
        cause,
        f"CUDA_VISIBLE_DEVICES {HIDDEN[cause]}",
        seen=f'CUDA_VISIBLE_DEVICES="{value}"; GPUs here: {there}',
        why=f'CUDA stops reading at "{culprit}"; what it then sees: {", ".join(entries) or "no GPU"}.',
        cure=cure(machine, cause, count),
    )


def visible_gpus(machine: Machine) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to CUDA, where they can be told from its entries; else all."""
    value, gpus = machine.environment.get("CUDA_VISIBLE_DEVICES"), smi(machine).gpus
    if value is None or len({gpu.name for gpu in gpus}) > 1:  # CUDA then counts in an order of its own
        return list(gpus)
    entries, _, _ = read_visible_devices(value, len(gpus), [gpu.uuid for gpu in gpus])
    found = [gpu for gpu in gpus if any(names(entry, gpu) for entry in entries)]
    return found or list(gpus)


def names(entry: str, gpu: Gpu) -> bool:
    return int(entry) == gpu.index if entry.isdecimal() else gpu.uuid.startswith(entry)


def cure(machine: Machine, cause: str, count: int) -> str:
    if cause == "hidden" and "SLURM_JOB_ID" in machine.environment:
        return f"salloc --gpus-per-node={min(gpus_wanted(machine), count)}   # Slurm sets the variable: ask it for GPUs"
    return "unset CUDA_VISIBLE_DEVICES   # every GPU; or: export CUDA_VISIBLE_DEVICES=0"
