"""Launch and teardown of the process group, clocks, memory and measured peak rates: the only place that
branches on cuda or cpu.
"""

from __future__ import annotations

import datetime
import os
import resource
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commons.lifecycle.cpu_name import cpu_name
from commons.lifecycle.outcome import attempt_number

if TYPE_CHECKING:
    import torch

MIB = 1024 * 1024
DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PEAK_MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
PEAK_REPEATS = 10
PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Device:
    """Where this rank computes, and its place in the job.

    Attributes:
        type: "cuda" or "cpu".
        name: of the GPU or CPU model, as its driver or system gives it.
        rank, local_rank, world_size: as torchrun counts them.
    """

    type: str
    name: str
    rank: int
    local_rank: int
    world_size: int

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device("cuda", self.local_rank) if self.type == "cuda" else torch.device("cpu")

    def synchronize(self) -> None:
        """Wait until everything given to the device is done."""
        if self.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def reset_peak_memory(self) -> None:
        if self.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype that ``--precision`` names."""
    import torch

    return getattr(torch, DTYPE_NAMES[precision])


def detect_type(wanted: str) -> str:
    """Resolve "auto" to "cuda" where torch sees a GPU, else "cpu". An explicit "cpu" hides the GPUs from this
    process.

    Colossal-AI's host backend must never run beside a visible GPU, so they are hidden before CUDA is first
    asked.
    """
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def free_port() -> int:
    """A TCP port on the loopback interface that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(device_type: str, timeout_seconds: float) -> Device:
    """Join the process group (collective): NCCL on GPUs, gloo on CPUs.

    Started by torchrun, the rank's place comes from the environment; started as plain ``python``, this is a
    job of one rank.

    Args:
        device_type: "cuda" or "cpu", already resolved.
        timeout_seconds: after which a stuck collective ends the process.
    """
    import torch
    import torch.distributed as dist

    if "RANK" not in os.environ:
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
        }
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    local_rank = int(os.environ["LOCAL_RANK"])
    name = cpu_name()
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
        name = torch.cuda.get_device_name(local_rank)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout, **_meeting_place(timeout))
    return Device(device_type, name, dist.get_rank(), local_rank, dist.get_world_size())


def _meeting_place(timeout: datetime.timedelta) -> dict[str, Any]:
    """Arguments of init_process_group for a run that torchrun's engine started again: a part of the store that
    the attempts before have not written in.

    torch takes it for granted that every attempt has a store of its own. With torchrun's static rendezvous none
    but the first has, and ranks would call at the addresses of the dead.
    """
    import torch.distributed as dist

    attempt = attempt_number()
    if attempt == 1:
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": world_size}


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
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._marks.clear()
        self._start = time.perf_counter()

    def mark(self, phase: str) -> None:
        """``phase``, one of ``PHASES``, begins here and lasts until the next mark. A phase may come more than
        once; times add up.
        """
        if self._on_phase is not None:
            self._on_phase(phase)
        self._marks.append((phase, self._now()))

    def stop(self) -> StepTiming:
        """Wait for the device and read the clocks."""
        self._marks.append(("end", self._now()))
        self._device.synchronize()
        step_seconds = time.perf_counter() - self._start
        phases: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            phases[phase] += self._elapsed_seconds(begin, end)
        return StepTiming(step_seconds, *phases.values())

    @staticmethod
    def _elapsed_seconds(begin: Any, end: Any) -> float:
        return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def every_rank(here: bool, device: torch.device) -> bool:
    """Whether it is so on every rank, which compute on ``device`` (collective)."""
    import torch
    import torch.distributed as dist

    everywhere = torch.tensor(float(here), device=device)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere.item())


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
    import torch

    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    peak = max(torch.cuda.max_memory_allocated(), allocated + replayed_bytes)
    allocated, reserved, peak = (held + shared_bytes for held in (allocated, reserved, peak))
    return MemoryUse(allocated / MIB, reserved / MIB, peak / MIB, host_mib)


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak is what the system tells
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()


def measured_peak_flops(device: Device, precision: str) -> float:
    """FLOP/s of a large square matrix product on random data: the median of a few, after one that warms up.

    Args:
        precision: "bf16", "fp16" or "fp32", the dtype of both factors.
    """
    import torch

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
