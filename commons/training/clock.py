"""What a step costs on one rank: its time by phases and its memory; and what a device can do at most, measured."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from commons.distributed.device import Device, compute_dtype

MIB = 1024 * 1024
TIMED_PHASES = ("forward", "backward", "optimizer")  # as StepTiming has them
PEAK_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
PEAK_REPEATS = 10


@dataclass(frozen=True)
class StepTiming:
    """Seconds of one step on one rank: all of it by the host's clock, and its phases by the device's."""

    step_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float


class PhaseClock:
    """Times the phases of a step, on the device, with one synchronisation at the end of the step.

    On a GPU the phases are bounded by CUDA events on the current stream, on a CPU by the host's clock.
    ``step_seconds`` is the host's clock from :meth:`start` to the end of the synchronisation, so nothing that
    the step did is left out.

    Args:
        on_phase: called with the phase's name as it begins.
    """

    def __init__(self, device: Device, on_phase: Callable[[str], object] | None = None) -> None:
        self._device = device
        self._on_phase = on_phase
        self._start = 0.0
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def _now(self) -> torch.cuda.Event | float:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._marks.clear()
        self._start = time.perf_counter()

    def mark(self, phase: str, at: torch.cuda.Event | None = None) -> None:
        """``phase``, one of ``TIMED_PHASES``, begins here, or at the event that a captured graph records, and lasts
        until the next mark. A phase may come more than once; times add up.
        """
        if self._on_phase is not None:
            self._on_phase(phase)
        self._marks.append((phase, self._now() if at is None else at))

    def stop(self) -> StepTiming:
        """Wait for the device and read the clocks."""
        self._marks.append(("end", self._now()))
        self._device.synchronize()
        step_seconds = time.perf_counter() - self._start
        phases: dict[str, float] = dict.fromkeys(TIMED_PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            phases[phase] += self._elapsed_seconds(begin, end)
        return StepTiming(step_seconds, *phases.values())

    @staticmethod
    def _elapsed_seconds(begin: Any, end: Any) -> float:
        return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one rank, in MiB; the device's are NaN on a CPU."""

    device_allocated_mib: float
    device_reserved_mib: float
    device_peak_mib: float
    host_mib: float


def memory_use(device: Device, replayed_bytes: int = 0, shared_bytes: int = 0) -> MemoryUse:
    """What torch's allocator holds, held at most since the last reset, and the process's resident set.

    Args:
        replayed_bytes: what a CUDA graph used beside what is allocated now, unseen by the allocator.
        shared_bytes: what is allocated unseen by it.
    """
    host_mib = _resident_bytes() / MIB
    if device.type == "cpu":
        nan = float("nan")
        return MemoryUse(nan, nan, nan, host_mib)
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    peak = max(torch.cuda.max_memory_allocated(), allocated + replayed_bytes)
    allocated, reserved, peak = (held + shared_bytes for held in (allocated, reserved, peak))
    return MemoryUse(allocated / MIB, reserved / MIB, peak / MIB, host_mib)


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the system knows only the peak
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


def measured_peak_flops(device: Device, precision: str) -> float:
    """FLOP/s of a large square matrix product on random data: the median of a few, after one that warms up.

    Args:
        precision: "bf16", "fp16" or "fp32", the dtype of both factors.
    """
    size = PEAK_MATMUL_SIZE[device.type]
    dtype = compute_dtype(precision)
    left, right = (torch.randn(size, size, device=device.torch_device).to(dtype) for _ in range(2))
    clock = PhaseClock(device)
    seconds = []
    for _ in range(PEAK_REPEATS + 1):
        clock.start()
        clock.mark("forward")
        torch.mm(left, right)
        seconds.append(clock.stop().forward_seconds)
    return 2 * size**3 / statistics.median(seconds[1:])
