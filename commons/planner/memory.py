"""How much memory a run takes, by kind, on device and host, at rest and at the peak of a step: :func:`forecast`.

Arithmetic in one process on a CPU: no process group, no GPU, nothing is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from commons.config.resolved import ResolvedConfig
from commons.planner.gpus import GpuModel

# In the order in which tables show them.
DEVICE_KINDS = (
    "parameters",
    "gradients",
    "master weights",
    "optimizer states",
    "gathered chunks",
    "inboxes",
    "activations",
    "logits and loss",
    "workspaces",
    "context and NCCL",
    "allocator slack",
)
# of one rank; "process" is what Python, its libraries and the driver take
HOST_KINDS = ("parameters", "gradients", "master weights", "optimizer states", "pinned beyond need", "process")
# What torch's allocator does not count.
UNCOUNTED = ("context and NCCL", "allocator slack")


@dataclass(frozen=True)
class Forecast:
    """Memory of the rank that takes most, in bytes.

    Attributes:
        device_at_rest, device_at_peak: by kind, of one device; between steps, and where a step takes most. On CPU ranks
            the device is the host too: what tensors take is here, and the process in ``host``.
        peak_phase: where the peak is: "forward", "loss", "backward" or "optimizer".
        host: by kind, of one rank, between steps and at the peak alike.
        pinned: of ``host``, what is pinned, as really pinned.
        shared_memory: of one rank in /dev/shm.
        ranks_per_host: so many ranks take ``host`` on one machine.
    """

    device_at_rest: Mapping[str, int]
    device_at_peak: Mapping[str, int]
    peak_phase: str
    host: Mapping[str, int]
    pinned: int
    shared_memory: int
    ranks_per_host: int

    @property
    def device_rest(self) -> int:
        """Bytes of one device between steps, all kinds."""
        return sum(self.device_at_rest.values())

    @property
    def device_peak(self) -> int:
        """Bytes of one device at the peak, all kinds: what has to be free there."""
        return sum(self.device_at_peak.values())

    @property
    def allocated_peak(self) -> int:
        """Bytes at the peak as torch's allocator, and the suite's ``device_peak_mib``, count them."""
        return sum(size for kind, size in self.device_at_peak.items() if kind not in UNCOUNTED)

    @property
    def host_bytes(self) -> int:
        """Bytes of one rank on the host, all kinds."""
        return sum(self.host.values())


def forecast(config: ResolvedConfig, world_size: int, local_world_size: int, gpu: GpuModel | None = None) -> Forecast:
    """What one rank of a run takes, the one that takes most.

    Args:
        world_size: ranks in all; ``local_world_size`` of them on a machine.
        gpu: what it runs on; None: an H100 for a run on GPUs, and nothing for one on CPUs.

    Raises:
        ValueError: the degrees do not divide ``world_size``.
    """
    raise NotImplementedError
