"""Which device this rank computes on, and the launch of its process group."""

from __future__ import annotations

import datetime
import os
import platform
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commons.lifecycle.outcome import attempt_number

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


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


def cpu_name() -> str:
    """The CPU's model name from /proc/cpuinfo, or what the platform module knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


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


def every_rank(here: bool, device: torch.device) -> bool:
    """Whether it is so on every rank, which compute on ``device`` (collective)."""
    import torch
    import torch.distributed as dist

    everywhere = torch.tensor(float(here), device=device)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere.item())
