"""How much memory a run takes, by kind, on device and host, at rest and at the peak of a step: :func:`forecast`.

Arithmetic in one process on a CPU: no process group, no GPU, nothing is built.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from commons.config.resolved import ResolvedConfig
from commons.ops.pinned_memory import SMALLEST_BYTES
from commons.planner.calibration import Calibration, default_for
from commons.planner.gpus import GpuModel
from commons.planner.states import Held, model_parameters, states, zero_redundancy_parts
from commons.planner.step import Run, phases

# In the order in which tables show them.
DEVICE_KINDS: tuple[str, ...] = (
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
HOST_KINDS: tuple[str, ...] = (
    "parameters",
    "gradients",
    "master weights",
    "optimizer states",
    "pinned beyond need",
    "process",
)
# Gemini's moments are made in its first optimizer step, from memory that the passes have left in large pieces: nothing
# is rounded up. (So it was measured; under torch's plans they are.)
MADE_LATER = ("CAI_Gemini", "optimizer states")
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
        context: of "context and NCCL", what a process takes that has only made a context.
    """

    device_at_rest: Mapping[str, int]
    device_at_peak: Mapping[str, int]
    peak_phase: str
    host: Mapping[str, int]
    pinned: int
    shared_memory: int
    ranks_per_host: int
    context: int = 0

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


def forecast(
    config: ResolvedConfig,
    world_size: int,
    local_world_size: int,
    gpu: GpuModel | None = None,
    calibration: Calibration | None = None,
    *,
    rough: bool = False,
) -> Forecast:
    """What one rank of a run takes, the one that takes most.

    Args:
        world_size: ranks in all; ``local_world_size`` of them on a machine.
        gpu: what it runs on; None: an H100 for a run on GPUs, and nothing for one on CPUs.
        calibration: what was measured there (default: what is known of such GPUs).
        rough: guess high what a block takes instead of tracing it, in milliseconds instead of seconds.

    Raises:
        ValueError: the degrees do not divide ``world_size``.
    """
    if world_size % config.model_parallel_size:
        raise ValueError(
            f"world size {world_size} is not divisible by tp x pp = {config.model_parallel_size}: use another number"
        )
    measured = calibration or default_for(gpu.capability if gpu else None)
    plans = [
        _of_rank(Run(config, world_size, local_world_size, rank, gpu, measured, rough))
        for rank in _different_ranks(config, world_size)
    ]
    return max(plans, key=lambda plan: (plan.device_peak, plan.host_bytes))


def _different_ranks(config: ResolvedConfig, world_size: int) -> Iterable[int]:
    """Ranks among which is the one that takes most: one of each stage; the one that updates most parameters."""
    if config.distplan == "Pytorch_ZeRO":
        parts = zero_redundancy_parts(tuple(model_parameters(config.shape())), world_size)
        sizes = [sum(parameter.elements for parameter in part) for part in parts]
        return [sizes.index(max(sizes))]
    return [stage * config.tp_degree for stage in range(config.pp_degree)]


def _of_rank(run: Run) -> Forecast:
    held = states(run.config, run.world_size, run.rank)
    on_gpu = run.config.device == "cuda"
    at_rest = Counter(dict.fromkeys(DEVICE_KINDS, 0))
    for each in held:
        if each.place in ("device", "shared"):
            fresh = on_gpu and each.place == "device" and (run.config.distplan, each.kind) != MADE_LATER
            at_rest[each.kind] += block_bytes(each.nbytes) if fresh else each.nbytes
    at_rest.update(run.always())
    moments = {name: at_rest + Counter(more) for name, more in phases(run, held)}
    phase, at_peak = max(moments.items(), key=lambda item: sum(item[1].values()))
    transient = sum(at_peak.values()) - sum(at_rest.values())
    if on_gpu:
        measured = run.calibration
        outside = measured.context + (measured.nccl if run.world_size > 1 else 0)
        slack = measured.slack + int(measured.slack_share * transient)
        at_rest.update({"context and NCCL": outside})
        at_peak.update({"context and NCCL": outside, "allocator slack": slack})
    host, pinned = _host(run, held)
    return Forecast(
        device_at_rest={kind: at_rest[kind] for kind in DEVICE_KINDS},
        device_at_peak={kind: at_peak[kind] for kind in DEVICE_KINDS},
        peak_phase=phase,
        host=host,
        pinned=pinned,
        shared_memory=0 if on_gpu else sum(each.nbytes for each in held if each.place == "shared"),
        ranks_per_host=run.local_world_size,
        context=run.calibration.context if on_gpu else 0,
    )


def _host(run: Run, held: Iterable[Held]) -> tuple[dict[str, int], int]:
    """Of one rank by kind, and how much of it is pinned."""
    host, pinned = Counter(dict.fromkeys(HOST_KINDS, 0)), 0
    for each in held:
        if each.place == "pinned":
            really = pinned_bytes(each.nbytes)
            pinned += really
            host[each.kind] += each.nbytes
            host["pinned beyond need"] += really - each.nbytes
        elif each.place == "host":
            host[each.kind] += each.nbytes
    host["process"] = run.calibration.process if run.config.device == "cuda" else run.calibration.cpu_process
    return dict(host), pinned


# --- how allocators round ---------------------------------------------------------------------------------------------

# torch's caching allocator on a GPU: blocks in multiples of 512 bytes; a large one is a segment of its own, a multiple
# of 2 MiB, whose end is given back only where it is larger than 1 MiB.
BLOCK, LARGE, SEGMENT, KEPT_END = 512, 10 << 20, 2 << 20, 1 << 20


def block_bytes(nbytes: int) -> int:
    """What torch's allocator on a GPU counts for a tensor that it has just got memory for."""
    rounded = max(BLOCK, nbytes + -nbytes % BLOCK)
    if rounded < LARGE:
        return rounded
    segment = rounded + -rounded % SEGMENT
    return segment if segment - rounded <= KEPT_END else rounded


def pinned_bytes(nbytes: int) -> int:
    """What commons.ops.pinned_memory takes: pages; below SMALLEST_BYTES torch's allocator, a power of two."""
    if nbytes < SMALLEST_BYTES:
        return 1 << (nbytes - 1).bit_length() if nbytes > 0 else 0
    return nbytes + -nbytes % mmap.PAGESIZE
