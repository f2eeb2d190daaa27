"""The rates behind the time model: every constant of it, by GPU where there are several, and what was measured here.

Where nothing was measured, a machine's rates are its datasheet's times the shares below. ``--calibrate`` measures them
and leaves a file in the user's cache folder, by GPU (or CPU) and torch's version; it counts for this machine alone.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commons.lifecycle.caches import cache_home
from commons.lifecycle.cpu_name import cpu_name
from commons.planner.machines import Machine
from commons.reporting.peak_rates import PRECISIONS, TERA, peak_flops
from commons.reporting.writing import write_json

# Shares of the datasheet that a plain measurement reaches: an 8192 cubed product in bf16 786 of 989 TFLOP/s
# (H200, docs of Colossal-AI's facts), a copy within the device, pinned copies to the host 52 of 63 GB/s (xl with its
# optimizer on the host, results/2026-11-25-h100), copies between GPUs 344 of 450 GB/s (31 MB a rank in 0.09 ms).
MATMUL_SHARE, MEMORY_SHARE, HOST_LINK_SHARE, LINK_SHARE = 0.79, 0.90, 0.83, 0.76
# A GPU whose peak no table knows, fp16 and bf16; fp32 a quarter of it.
UNKNOWN_PEAK = 60 * TERA
# fp8's products of the blocks, to bf16's: 213 ms became 113 (NOTES.md, 2026-11-25).
FP8_SPEEDUP = 1.88
# Before Ampere bf16 is emulated.
EMULATED_BF16 = 0.25
NODE_LINK_SHARE = 0.8
# Elements per second and core that Adam updates on the host, states in fp32: 10.3e9 in 2.0 s with 32 cores
# (2026-11-26-h100-copies) and 5.1e9 in 1.17 s (2026-11-26-h100-replicated).
HOST_ADAM_PER_CORE = 1.5e8
# One core of a CPU rank: matrix products in fp32, bytes of memory; gloo between ranks of one host.
CPU_CORE_FLOPS, CPU_CORE_MEMORY, CPU_LINK = 4.0e10, 8e9, 1.5e9


@dataclass(frozen=True)
class Rates:
    """What a machine does when nothing stands in its way; step_time says what of it a training reaches.

    Attributes:
        matmul_flops: FLOPs per second of one device in large matrix products, by precision.
        memory_bandwidth: bytes per second, read and written, of one device's memory.
        link_bandwidth: bytes per second and direction of one device to the others of its host.
        node_bandwidth: likewise of one host to the others.
        host_link_bandwidth: of one device to its host.
        host_adam: elements per second that one host updates with all its cores.
        measured: names of those that were measured on this machine.
    """

    matmul_flops: Mapping[str, float]
    memory_bandwidth: float
    link_bandwidth: float
    node_bandwidth: float
    host_link_bandwidth: float
    host_adam: float
    measured: tuple[str, ...] = ()


def default_rates(machine: Machine) -> Rates:
    """From the datasheet, or for CPU ranks from the number of cores."""
    node, host_adam = machine.node_link * NODE_LINK_SHARE, HOST_ADAM_PER_CORE * machine.cores_per_node
    if machine.gpu is None:
        cores = max(1.0, machine.cores_per_node / machine.gpus_per_node)
        flops: dict[str, float] = dict.fromkeys(PRECISIONS, cores * CPU_CORE_FLOPS)
        memory = cores * CPU_CORE_MEMORY
        return Rates(flops, memory, CPU_LINK, min(node, CPU_LINK), memory, host_adam)
    speeds = machine.speeds
    flops = {precision: _matmul_flops(machine, precision) for precision in ("bf16", "fp16", "fp32")}
    return Rates(
        {**flops, "fp8": flops["bf16"] * FP8_SPEEDUP},
        speeds.memory * MEMORY_SHARE,
        speeds.link * LINK_SHARE,
        node,
        speeds.host_link * HOST_LINK_SHARE,
        host_adam,
    )


def _matmul_flops(machine: Machine, precision: str) -> float:
    assert machine.gpu is not None
    peak = peak_flops(machine.gpu.device_name, precision)
    if peak is None:
        fp16 = peak_flops(machine.gpu.device_name, "fp16") or UNKNOWN_PEAK
        emulated = precision == "bf16" and machine.gpu.capability < (8, 0)
        peak = fp16 * {"fp16": 1.0, "bf16": EMULATED_BF16 if emulated else 1.0, "fp32": 0.25}[precision]
    return peak * MATMUL_SHARE


# ---- what was measured here

VERSION = 1
MEASURED = (
    "matmul_flops",
    "memory_bandwidth",
    "link_bandwidth",
    "host_link_bandwidth",
    "host_adam",
)


class CalibrationError(ValueError):
    """The file of measured rates cannot be used; the text says why and what to do, in one line."""


def device_key(machine: Machine) -> str:
    """What a calibration belongs to: the device's name and the number of CPU cores."""
    name = machine.gpu.device_name if machine.gpu else cpu_name() or "CPU"
    return f"{name}, {machine.cores_per_node} cores"


def calibration_path(machine: Machine) -> Path:
    """Where ``--calibrate`` leaves the rates of this machine: the user's cache folder, a file per device."""
    name = re.sub(r"[^a-z0-9]+", "-", device_key(machine).lower()).strip("-")
    return cache_home() / "gemini-gpt2" / f"rates-{name}.json"


def save_rates(path: Path, machine: Machine, measured: Mapping[str, Any], torch_version: str) -> None:
    """Write a calibration. SinkError (an OSError) where that cannot be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"version": VERSION, "device": device_key(machine), "torch": torch_version, "rates": dict(measured)}
    write_json(path, document)


def rates_of(machine: Machine) -> Rates:
    """The machine's rates: measured ones where ``--calibrate`` has been run here, else the defaults.

    Raises:
        CalibrationError: the file is damaged, or of another machine.
    """
    rates = default_rates(machine)
    if not machine.at_hand:
        return rates
    path = calibration_path(machine)
    return with_measured(rates, machine, path) if path.exists() else rates


def with_measured(rates: Rates, machine: Machine, path: Path) -> Rates:
    """``rates`` with those that the file at ``path`` holds in their place. Raises CalibrationError."""
    again = f"measure again with --calibrate, or remove {path}"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = {name: document["rates"][name] for name in MEASURED if document["rates"].get(name) is not None}
        device, version = document["device"], document["version"]
        whole = version == VERSION and all(_is_rate(value) for value in found.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole, device, found = False, "", {}
    if not whole:
        raise CalibrationError(f"the calibration {path} is damaged: {again}")
    if device != device_key(machine):
        raise CalibrationError(f"the calibration {path} is of {device}, and this is {device_key(machine)}: {again}")
    if machine.gpu is None:  # measured on all cores, of which each rank has its share
        for name in found.keys() & {"matmul_flops", "memory_bandwidth"}:
            found[name] = _divided(found[name], machine.gpus_per_node)
    flops = {**rates.matmul_flops, **found.get("matmul_flops", {})}
    if "bf16" in found.get("matmul_flops", {}):
        flops["fp8"] = flops["bf16"] * FP8_SPEEDUP
    return dataclasses.replace(rates, **{**found, "matmul_flops": flops}, measured=tuple(found))


def _divided(rate: Any, ranks: int) -> Any:
    return {name: value / ranks for name, value in rate.items()} if isinstance(rate, Mapping) else rate / ranks


def _is_rate(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(_is_rate(item) for item in value.values())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e20
