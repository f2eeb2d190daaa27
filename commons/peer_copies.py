"""Tensors gathered and averaged by copies from memory to memory, without a kernel that communicates:
``--peer_copies``.

NCCL's kernels take multiprocessors of the GPU, for which a persistent matrix product beside them has to wait. The GPUs
of one host can read and write each other's memory, and their copy engines do so beside all multiprocessors. Waiting for
another rank needs none either: a stream waits for a number in memory (a stream memory operation of the driver), no
kernel spins.

What ranks tell each other are flags, one of each kind for every pair. A rank raises it in the other's memory; the other
waits for it and takes it down before it does anything that lets it be raised again, so that none is missed:

- ``BEGIN`` and its like: the stream has come to a point where all ranks wait for each other. Behind it the teller's
  parts do not change until the pass over the model is through.
- ``ARRIVED``: the teller has written its contribution to an average into the listener's inbox.

All ranks average the same tensors in the same order, on one stream each. A part may be overwritten by its average: each
contribution comes from a rank that has passed its last use of the tensor, so that no one still reads the part. Nor is
an inbox written too early: a rank's contribution to the average after the next one waits for all others' to the next,
and each of these is behind the reading of the one before. No number in it changes from step to step, so that it can be
recorded (commons.step_graph).

On a CPU the ranks of a host share memory in files, and the same order of things is kept by looking at the flags.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from commons.compiling import say
from commons.ending import RunError

if TYPE_CHECKING:
    from commons.config import TrainConfig
    from commons.device import Device

Result = TypeVar("Result")

SLOTS = 2  # contributions of a rank that an inbox holds: one that comes in, one that is added up
ALIGNED_ELEMENTS = 128  # parts begin at a multiple, so that wide copies and kernels find them aligned
LOOK_SECONDS = 50e-6  # between two looks at a flag, on a CPU


class Flag(IntEnum):
    """What is told; see the module. Those of a kind are used in turn."""

    BEGIN = 0
    BEGIN_TOO = 1
    BEGIN_RECORDED = 2  # where passes are replayed, they meet here always, and no one else does
    ARRIVED = 3
    ARRIVED_TOO = 4


class Peers(Protocol):
    """The ranks of a process group that reach each other's memory.

    Attributes:
        rank, size: in the group.
        unseen_bytes: memory given out that torch's allocator does not count.
    """

    rank: int
    size: int
    unseen_bytes: int

    def share(self, elements: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Zeros on every rank, flat, as every rank can read and write them; by rank (collective)."""
        ...

    def tell(self, peer: int, flag: int) -> None:
        """Raise ``flag`` at ``peer``, behind everything that the current stream was given before."""
        ...

    def await_told(self, peer: int, flag: int) -> None:
        """Let the current stream go on when ``peer`` has raised ``flag`` here, and take it down."""
        ...

    def recording(self) -> bool:
        """Whether what the current stream is given is recorded, and not done."""
        ...


def _on_all(group: dist.ProcessGroup, attempt: Callable[[], Result]) -> Result:
    """What ``attempt`` returns (collective).

    Raises:
        RuntimeError: it failed on a rank; on every one.
    """
    result, problem = None, None
    try:
        result = attempt()
    except (RuntimeError, OSError, AttributeError, ImportError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group)
    for rank, told in enumerate(problems):
        if told is not None:
            raise RuntimeError(f"rank {rank}: {told}")
    return result  # pyright: ignore[reportReturnType]


class GpuPeers:
    """GPUs of one host, through torch's symmetric memory and stream memory operations.

    https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEMOP.html
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.unseen_bytes = 0
        self._group = group
        self._driver = _on_all(group, self._find_driver)
        self._handles: list[Any] = []  # what keeps the other ranks' memory mapped
        self._signals = self.share(len(Flag) * self.size, torch.int32)
        self._try_out()

    def _find_driver(self) -> ctypes.CDLL:
        here, count = torch.cuda.current_device(), torch.cuda.device_count()
        for there in range(self.size):
            if there != here and (there >= count or not torch.cuda.can_device_access_peer(here, there)):
                raise RuntimeError(f"no access from GPU {here} to GPU {there}")
        return ctypes.CDLL("libcuda.so.1")

    def _try_out(self) -> None:
        """Raise a flag at every other rank and look whether theirs are up here, so that waiting for them ends."""
        others = [peer for peer in range(self.size) if peer != self.rank]

        def tell() -> None:
            for peer in others:
                self.tell(peer, Flag.BEGIN)
            torch.cuda.synchronize()

        def look() -> None:
            if int(self._signals[self.rank].sum()) != len(others):
                raise RuntimeError("what other ranks write is not seen")
            for peer in others:
                self.await_told(peer, Flag.BEGIN)
            torch.cuda.synchronize()

        _on_all(self._group, tell)
        _on_all(self._group, look)  # the first flag in earnest finds them down

    def share(self, elements: int, dtype: torch.dtype) -> list[torch.Tensor]:
        from torch.distributed import _symmetric_memory as symmetric

        def allocate() -> torch.Tensor:
            before = torch.cuda.memory_allocated()
            own = symmetric.empty(elements, dtype=dtype, device=torch.device("cuda", torch.cuda.current_device()))
            self.unseen_bytes += own.nbytes - (torch.cuda.memory_allocated() - before)
            return own.zero_()

        own = _on_all(self._group, allocate)
        handle: Any = _on_all(self._group, lambda: symmetric.rendezvous(own, self._group))
        self._handles.append(handle)
        torch.cuda.synchronize()
        dist.barrier(self._group)  # no one writes into what another has yet to fill with zeros
        return [own if peer == self.rank else handle.get_buffer(peer, (elements,), dtype) for peer in range(self.size)]

    def tell(self, peer: int, flag: int) -> None:
        self._call("cuStreamWriteValue32_v2", self._signals[peer], flag * self.size + self.rank, 1)

    def await_told(self, peer: int, flag: int) -> None:
        own = self._signals[self.rank], flag * self.size + peer
        self._call("cuStreamWaitValue32_v2", *own, 1)
        self._call("cuStreamWriteValue32_v2", *own, 0)

    def recording(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _call(self, function: str, flags: torch.Tensor, index: int, value: int) -> None:
        """With the driver's flags 0: write behind all earlier work, wait for at least ``value``."""
        status = getattr(self._driver, function)(
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            ctypes.c_uint64(flags.data_ptr() + flags.itemsize * index),
            ctypes.c_uint32(value),
            ctypes.c_uint(0),
        )
        if status:
            raise RuntimeError(f"{function} returned {status}")


class HostPeers:
    """Ranks on the CPUs of one host, through files in memory. They are removed from the directory as soon as every rank
    has mapped them.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.unseen_bytes = 0
        self._group = group
        _on_all(group, self._check_processor)
        self._signals = self.share(len(Flag) * self.size, torch.int32)

    def _check_processor(self) -> None:
        """What is written first has to be seen first; other processors do not keep to it by themselves."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            raise RuntimeError(f"on {platform.machine()} processors")

    def share(self, elements: int, dtype: torch.dtype) -> list[torch.Tensor]:
        memory = Path("/dev/shm")
        folder = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
        own = folder / f"gemini-gpt2-{uuid.uuid4().hex}"
        nbytes = elements * dtype.itemsize

        def create() -> None:
            with open(own, "xb") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)  # fails where there is no room, and not at a later write

        def map_all() -> list[mmap.mmap]:
            maps = []
            for name in names:
                with open(name, "r+b") as file:
                    maps.append(mmap.mmap(file.fileno(), nbytes))
            return maps

        names: list[Any] = [None] * self.size
        try:
            _on_all(self._group, create)
            dist.all_gather_object(names, str(own), self._group)
            maps = _on_all(self._group, map_all)
        finally:
            own.unlink(missing_ok=True)
        return [torch.frombuffer(each, dtype=dtype) for each in maps]

    def tell(self, peer: int, flag: int) -> None:
        self._signals[peer][flag * self.size + self.rank] = 1

    def await_told(self, peer: int, flag: int) -> None:
        own = self._signals[self.rank][flag * self.size + peer]
        while own.item() == 0:
            time.sleep(LOOK_SECONDS)
        own.zero_()

    def recording(self) -> bool:
        return False


class PeerCopies:
    """Gathers and averages tensors of which every rank holds a part.

    Args:
        peers: all of the tensors' ranks.
        part_sizes: elements of each tensor's part.
        dtype: of all tensors.

    Attributes:
        parts: for each tensor its parts by rank, flat; this rank's are its own to fill.
        shared_bytes: device memory taken for it, as far as torch's allocator does not count it.
    """

    def __init__(self, peers: Peers, part_sizes: list[int], dtype: torch.dtype) -> None:
        self._peers = peers
        self._meetings = self._averages = 0
        # at one time every rank reads from another: the next one after it first
        self._others = [(peers.rank + distance) % peers.size for distance in range(1, peers.size)]
        rooms = [size + -size % ALIGNED_ELEMENTS for size in part_sizes]
        arenas = [arena.split(rooms) for arena in peers.share(sum(rooms), dtype)]
        self.parts = [[rank_parts[index][:size] for rank_parts in arenas] for index, size in enumerate(part_sizes)]
        width = max(rooms)
        self._inboxes = [
            inbox.view(SLOTS, peers.size - 1, width) for inbox in peers.share(SLOTS * (peers.size - 1) * width, dtype)
        ]
        self.shared_bytes = peers.unseen_bytes

    def meet(self) -> None:
        """Let the current stream wait for those of all other ranks. To be called before a pass over the model, behind
        everything that writes parts, and after a pass that averages nothing.
        """
        flag = (Flag.BEGIN, Flag.BEGIN_TOO)[self._meetings % 2]
        if self._peers.recording():
            flag = Flag.BEGIN_RECORDED
        else:
            self._meetings += 1
        self._tell_all(flag)
        self._await_all(flag)

    def gather(self, parts: list[torch.Tensor], whole: torch.Tensor) -> None:
        """Copy all ``parts``, by rank, into ``whole`` [ranks * elements], on the current stream, which is behind the
        pass's meeting.
        """
        pieces = whole.chunk(self._peers.size)
        for peer in (*self._others, self._peers.rank):
            pieces[peer].copy_(parts[peer])

    def average(self, whole: torch.Tensor, out: torch.Tensor) -> None:
        """Put the mean over the ranks of this rank's piece of their ``whole`` [ranks * elements] into ``out``, summed
        up in fp32, on the current stream (every rank has to).
        """
        peers, pieces = self._peers, whole.chunk(self._peers.size)
        slot = self._averages % SLOTS
        self._averages += 1
        for peer in self._others:
            self._room(peer, slot, peers.rank)[: len(out)].copy_(pieces[peer])
            peers.tell(peer, Flag.ARRIVED + slot)
        self._await_all(Flag.ARRIVED + slot)
        received = self._inboxes[peers.rank][slot, :, : len(out)]
        mean_of(pieces[peers.rank], received, out)

    def _tell_all(self, flag: int) -> None:
        for peer in self._others:
            self._peers.tell(peer, flag)

    def _await_all(self, flag: int) -> None:
        for peer in self._others:
            self._peers.await_told(peer, flag)

    def _room(self, listener: int, slot: int, teller: int) -> torch.Tensor:
        """Where in its inbox a rank finds the contribution of another."""
        return self._inboxes[listener][slot, (teller - listener) % self._peers.size - 1]


def mean_of(own: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
    """Put the mean of ``own`` [elements] and of the rows of ``others`` [rows, elements] into ``out``, summed up in
    fp32.
    """
    if own.is_cuda and _has_kernels():
        from commons.gpu_kernels import mean_

        mean_(own, others, out)
        return
    total = own.to(torch.float32, copy=True)
    for other in others:
        total += other
    out.copy_(total.div_(1 + len(others)))


@functools.cache
def _has_kernels() -> bool:
    if find_spec("triton") is None:
        return False
    from commons.gpu_kernels import fits

    return fits()


def peer_problems(config: TrainConfig, world_size: int, local_world_size: int) -> Iterator[str]:
    """Where nothing can be gathered by copies, one reason each."""
    offload = config.offload_optim_frac or config.offload_param_frac
    rules = (
        (config.distplan != "CAI_Gemini", f"under {config.distplan}"),
        (config.gemini_hooks == "operation", "under --gemini_hooks operation"),
        (config.tp_degree > 1, "under --tp_degree, whose collectives are inside of blocks"),
        (config.placement not in ("static", "cuda"), f"under --placement {config.placement}, which moves chunks"),
        (offload, "under --offload_optim_frac and --offload_param_frac, which move chunks"),
        (config.data_parallel_size(world_size) == 1, "on one data-parallel rank, which has everything itself"),
        (world_size > local_world_size, "between the memories of several machines"),
    )
    return (text for applies, text in rules if applies)


def find_peers(config: TrainConfig, device: Device) -> Peers | None:
    """All ranks, where ``--peer_copies`` asks for it and they reach each other's memory (collective).

    Raises:
        RunError: they do not, and it was asked for, or ``--cuda_graph on``, which needs it.
    """
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", device.world_size))
    possible = not any(peer_problems(config, device.world_size, local_world_size))
    if config.peer_copies == "off" or (config.peer_copies == "auto" and not (possible and device.type == "cuda")):
        return None
    try:
        return _peers(device)
    except RuntimeError as error:
        text = f"the ranks do not reach each other's memory ({error})"
    wanted = [f"--{name} off" for name in ("peer_copies", "cuda_graph") if getattr(config, name) == "on"]
    if wanted:
        raise RunError(f"{text}: use {' and '.join(wanted)}")
    say(f"{text}: gradients and chunks go by NCCL (--peer_copies)")
    return None


def _peers(device: Device) -> Peers:
    group: Any = dist.group.WORLD
    return GpuPeers(group) if device.type == "cuda" else HostPeers(group)
