"""Machines to plan for: described in words ("8 x H100-80GB, 1000 GiB host"), or the one at hand."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from commons.config.auto import is_compilable
from commons.config.resolved import ResolvedConfig
from commons.config.schema import TrainConfig
from commons.doctor.machine import Machine as HostMachine
from commons.planner.calibration import default_for
from commons.planner.gpus import GIB, GPU_MODELS, GpuModel
from commons.planner.room import host_room

GIGA = 1e9
MOST_GPUS_PER_NODE = 8  # of a host with NVLink between all of them; more are taken as several such hosts
USUAL_NODE_LINK = 400e9 / 8
LEAST_GPU_GB, MOST_GPU_GB = 1, 1024
MOST_HOST_BYTES = 1024 * 1024 * GIB
FIRST_COMPILED = (7, 0)  # the oldest GPUs that Triton compiles for
USUAL_CORES_PER_GPU = 16  # of the hosts that benchmarks/results were measured on


class Speeds(NamedTuple):
    """What the datasheet says of a GPU's memory and links, bytes per second and direction.

    Attributes:
        memory: device memory.
        link: to the other GPUs of the host: NVLink, PCIe where the card has none, half of it through the host's memory
            where GPUs do not reach each other (GeForce).
        host_link: to the host, PCIe with 16 lanes unless the card has fewer.
    """

    memory: float
    link: float
    host_link: float


_PCIE3, _PCIE4, _PCIE5 = 15.75e9, 31.5e9, 63e9
# By the names of commons.planner.gpus; bandwidths from NVIDIA's datasheets and product pages.
SPEEDS: dict[str, Speeds] = {
    "H100-80GB": Speeds(3352e9, 450e9, _PCIE5),
    "H100-PCIE-80GB": Speeds(2039e9, _PCIE5, _PCIE5),
    "H100-NVL-94GB": Speeds(3938e9, _PCIE5, _PCIE5),
    "H200-141GB": Speeds(4800e9, 450e9, _PCIE5),
    "B200-180GB": Speeds(7700e9, 900e9, _PCIE5),
    "A100-80GB": Speeds(2039e9, 300e9, _PCIE4),
    "A100-40GB": Speeds(1555e9, 300e9, _PCIE4),
    "A40-48GB": Speeds(696e9, _PCIE4, _PCIE4),
    "A10-24GB": Speeds(600e9, _PCIE4, _PCIE4),
    "L40S-48GB": Speeds(864e9, _PCIE4, _PCIE4),
    "L4-24GB": Speeds(300e9, _PCIE4, _PCIE4),
    "V100-32GB": Speeds(900e9, 150e9, _PCIE3),
    "V100-16GB": Speeds(900e9, 150e9, _PCIE3),
    "T4-16GB": Speeds(320e9, _PCIE3, _PCIE3),
    "RTX-3060-12GB": Speeds(360e9, _PCIE4 / 2, _PCIE4),
    "RTX-3090-24GB": Speeds(936e9, _PCIE4 / 2, _PCIE4),
    "RTX-4060-8GB": Speeds(272e9, _PCIE4 / 4, _PCIE4 / 2),
    "RTX-4070-12GB": Speeds(504e9, _PCIE4 / 2, _PCIE4),
    "RTX-4090-24GB": Speeds(1008e9, _PCIE4 / 2, _PCIE4),
    "RTX-5090-32GB": Speeds(1792e9, _PCIE5 / 2, _PCIE5),
}
# Of a GPU that the table does not know: slow on every count, so that no plan is chosen for a link it may not have.
UNKNOWN_SPEEDS = Speeds(300e9, _PCIE3, _PCIE3)


@dataclass(frozen=True)
class Machine:
    """What a job runs on.

    Attributes:
        nodes, gpus_per_node: hosts, and devices (ranks) on each.
        gpu: None on CPU ranks.
        host_bytes: memory of one host; None where it was not told, which judges no host.
        node_link: bytes per second and direction into one host from the others.
        cores_per_node: CPU cores of one host.
        assumed: what the description left open and was filled in, a sentence each.
        at_hand: it is this machine, so that layouts can be tried on it.
    """

    nodes: int
    gpus_per_node: int
    gpu: GpuModel | None
    host_bytes: int | None
    node_link: float
    cores_per_node: int
    assumed: tuple[str, ...] = ()
    at_hand: bool = False

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def device_type(self) -> str:
        return "cpu" if self.gpu is None else "cuda"

    @property
    def speeds(self) -> Speeds:
        """Datasheet bandwidths of the GPU; of a slow one where the table does not know it."""
        return UNKNOWN_SPEEDS if self.gpu is None else SPEEDS.get(self.gpu.name, UNKNOWN_SPEEDS)

    @property
    def has_peer_access(self) -> bool:
        """Whether GPUs of one host reach each other's memory: GeForce's driver does not let them."""
        return self.gpu is not None and "GeForce" not in self.gpu.device_name

    def describe(self) -> str:
        """As ``--plan_for`` takes it."""
        device = "CPU rank" if self.gpu is None else self.gpu.name
        parts = [f"{self.gpus_per_node} x {device}"]
        if self.nodes > 1:
            parts = [f"{self.nodes} nodes of {parts[0]}"]
        if self.host_bytes is not None:
            parts.append(f"{self.host_bytes / GIB:.0f} GiB host")
        if self.nodes > 1:
            parts.append(f"{self.node_link * 8 / GIGA:.0f} Gbit/s")
        return ", ".join(parts)


EXAMPLE = '"128 nodes of 8 x H100-80GB, 2000 GiB host, 400 Gbit/s"'
_GPUS = re.compile(
    r"(?:(?P<nodes>\d+)\s*nodes?\s*(?:of\s+)?)?(?:(?P<count>\d+)\s*[x×*]\s*)?(?P<gpu>[a-z].*)", re.IGNORECASE
)
_HOST = re.compile(r"(?P<size>[\d.]+)\s*(?P<unit>[GT]i?B)\s*(?:host|of host memory|host memory)", re.IGNORECASE)
_LINK = re.compile(r"(?:(?P<count>\d+)\s*[x×*]\s*)?(?P<rate>[\d.]+)\s*(?P<unit>Gbit/s|Gb/s|Gbps|GB/s)")
_HOST_UNITS = {"gb": 10**9, "gib": GIB, "tb": 10**12, "tib": 1024 * GIB}


def parse_machine(text: str) -> Machine:
    """A description's machine: "[N nodes of] N x GPU[, N GiB host][, [N x] N Gbit/s]".

    The host's memory and the network's rate are those of one node. Without nodes, more than eight GPUs are taken as
    hosts of at most eight.

    Raises:
        ValueError: what cannot be read, or cannot be, and what would work; one line.
    """
    first, *rest = [part.strip() for part in text.split(",")]
    match = _GPUS.fullmatch(first)
    if match is None:
        raise ValueError(f"{first!r} names no GPUs: write it as {EXAMPLE}")
    gpu = find_gpu(match["gpu"])
    count = _count(match["count"] or "1", "GPUs")
    nodes = _count(match["nodes"] or "0", "nodes") if match["nodes"] else 0
    assumed: list[str] = []
    if nodes:
        per_node = count
    else:
        per_node = max(size for size in range(1, MOST_GPUS_PER_NODE + 1) if count % size == 0)
        nodes = count // per_node
        if nodes > 1:
            assumed.append(f"{count} GPUs are taken as {nodes} hosts of {per_node}")
    host_bytes, node_link = _host_and_link(rest)
    if host_bytes is None:
        assumed.append("the hosts' memory is not given (for example 1000 GiB host): taken as enough")
    if node_link is None and nodes > 1:
        assumed.append(f"{USUAL_NODE_LINK * 8 / GIGA:.0f} Gbit/s between hosts are assumed, for each host in all")
    cores = USUAL_CORES_PER_GPU * per_node
    return Machine(nodes, per_node, gpu, host_bytes, node_link or USUAL_NODE_LINK, cores, tuple(assumed))


def _host_and_link(parts: Sequence[str]) -> tuple[int | None, float | None]:
    host_bytes, node_link = None, None
    for part in parts:
        if match := _HOST.fullmatch(part):
            host_bytes = int(float(match["size"]) * _HOST_UNITS[match["unit"].lower()])
            if not 0 < host_bytes <= MOST_HOST_BYTES:
                raise ValueError(f"{part!r} is no host's memory: write for example 1000 GiB host")
        elif match := _LINK.fullmatch(part):
            bits = 8 if match["unit"] == "GB/s" else 1
            node_link = int(match["count"] or 1) * float(match["rate"]) * bits * GIGA / 8
            if not node_link > 0:
                raise ValueError(f"{part!r} is no network's rate: write for example 400 Gbit/s")
        else:
            raise ValueError(f"{part!r} is neither a node's memory nor its network: write it as {EXAMPLE}")
    return host_bytes, node_link


def _count(text: str, what: str) -> int:
    number = int(text)
    if not 1 <= number <= 100_000:
        raise ValueError(f"{number} {what} cannot be planned for: write a number from 1 to 100000")
    return number


def find_gpu(text: str) -> GpuModel:
    """The GPU that a user means: by the table's name, with another amount of memory, or by the driver's name.

    Raises:
        ValueError: no such GPU, several such, or a memory that no GPU has.
    """
    wanted = re.sub(r"[\s_]+", "-", text.strip().lower()).removeprefix("nvidia-").removeprefix("geforce-")
    by_name = {name.lower(): model for name, model in GPU_MODELS.items()}
    drivers = {re.sub(r"\s+", " ", model.device_name.lower()): model for model in GPU_MODELS.values()}
    if model := by_name.get(wanted) or drivers.get(" ".join(text.lower().split())):
        return model
    stem, gigabytes = _without_memory(wanted)
    same = [model for name, model in by_name.items() if _without_memory(name)[0] == stem]
    if not same:
        raise ValueError(f"GPU {text.strip()!r} is not known: {_nearest(wanted, GPU_MODELS)}")
    if gigabytes is None:
        if len(same) > 1:
            raise ValueError(f"GPU {text.strip()!r} comes in several sizes: use {_either(m.name for m in same)}")
        return same[0]
    if not LEAST_GPU_GB <= gigabytes <= MOST_GPU_GB:
        raise ValueError(
            f"GPU {text.strip()!r}: {gigabytes:g} GB is no GPU's memory: use {_either(model.name for model in same)}"
        )
    known = same[0]
    scale = gigabytes / (_without_memory(known.name.lower())[1] or gigabytes)
    return dataclasses.replace(known, memory_bytes=int(known.memory_bytes * scale))


def _without_memory(name: str) -> tuple[str, float | None]:
    match = re.fullmatch(r"(.*?)-?(\d+(?:\.\d+)?)\s*-?gi?b", name)
    return (match[1], float(match[2])) if match else (name, None)


def _nearest(wanted: str, names: Iterable[str]) -> str:
    lower = {name.lower(): name for name in names}
    # "h1000" is like "h100", not like "h100-80gb"
    stems = {name.split("-")[0] if not name.startswith("rtx") else name.rsplit("-", 1)[0]: name for name in lower}
    close = difflib.get_close_matches(_without_memory(wanted)[0], [*lower, *stems], n=4, cutoff=0.5)
    found = dict.fromkeys(lower[stems.get(match, match)] for match in close)
    return f"did you mean {_either(list(found)[:3])}?" if found else f"use {_either(lower.values())}"


def _either(names: Iterable[str]) -> str:
    *rest, last = names
    return f"{', '.join(rest)} or {last}" if rest else last


def resolve_for(given: TrainConfig, machine: Machine) -> ResolvedConfig:
    """``given``, resolved for a machine. Another machine is taken to have everything installed: blocks are
    compiled and passes captured there wherever they can be, whatever this one lacks.
    """
    ranks = machine.world_size, machine.gpus_per_node
    config = given.resolve(machine.device_type, *ranks)
    if machine.at_hand or machine.gpu is None or config.compile == "on" or config.asked("compile"):
        return config
    if not is_compilable(config) or machine.gpu.capability < FIRST_COMPILED:
        return config
    compiled = dataclasses.replace(given, compile="on").resolve(machine.device_type, *ranks)
    return dataclasses.replace(compiled, chosen=config.chosen)


def this_machine(nodes: int, ranks_per_node: int, device_type: str) -> Machine:
    """The machine at hand, with ``ranks_per_node`` of its devices; all nodes are taken to be like this one.

    Where ``device_type`` is "cuda" a process of its own asks for the GPUs, which takes seconds. RuntimeError where that
    fails.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu = _gpu_at_hand(ranks_per_node) if device_type == "cuda" else None
    free, _ = host_room(HostMachine())
    return Machine(nodes, ranks_per_node, gpu, free, USUAL_NODE_LINK, cores, at_hand=True)


def _gpu_at_hand(ranks: int) -> GpuModel:
    """The GPU of the first rank, with the memory that the fullest of all ranks' GPUs has left, a context included."""
    from commons.planner.gpu_probe import rooms_in_a_child

    rooms = rooms_in_a_child(ranks)
    gpu, free = rooms[0][0], min(free for _, free in rooms)
    return dataclasses.replace(gpu, memory_bytes=min(gpu.memory_bytes, free + default_for(gpu.capability).context))
