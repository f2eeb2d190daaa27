"""The ranks of one host that read and write each other's memory: what commons.distributed.peer_copies is made of.

GPUs do so through torch's symmetric memory, CPU ranks through files in memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

LOOK_SECONDS = 50e-6  # between two looks at a flag, on a CPU
TRIAL_FLAG = 0  # any: it is down again when the trial is over
TRIAL_ELEMENTS = 1 << 18  # 1 MiB: as long a copy as takes the copy engines' way
TIMED_COPIES = 32
# torch would set up NVLink multicast for memory that ranks share. Nothing here uses it, and on some hosts it is what
# fails (https://github.com/pytorch/pytorch/issues/162429).
NO_MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


class Peers(Protocol):
    """The ranks of a process group that reach each other's memory.

    Attributes:
        rank, size: in the group.
        unseen_bytes: memory given out that torch's allocator does not count.
        link_rate: bytes per second that were copied from another rank, when all did so.
    """

    rank: int
    size: int
    unseen_bytes: int
    link_rate: float

    def share(self, elements: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Zeros on every rank, flat, as every rank can read and write them; by rank (collective)."""
        ...

    def signal(self, peer: int, flag: int) -> None:
        """Raise ``flag`` at ``peer``, behind everything that the current stream was given before."""
        ...

    def wait(self, peer: int, flag: int) -> None:
        """Let the current stream go on when ``peer`` has raised ``flag`` here, and take it down."""
        ...

    def raised(self) -> int:
        """How many flags are raised here, waited for or not; the host waits for the device."""
        ...

    def capturing(self) -> bool:
        """Whether what the current stream is given is captured into a CUDA graph, and not done."""
        ...


def _on_all(group: dist.ProcessGroup, attempt: Callable[[], Result]) -> Result:
    """What ``attempt`` returns (collective).

    Raises:
        RuntimeError: it failed on a rank; on every one.
    """
    result, problem = None, None
    try:
        result = attempt()
    except Exception as error:  # the interfaces are torch's private ones and the driver's: whatever they raise
        problem = str(error) or repr(error)
    problems: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group)
    for rank, reported in enumerate(problems):
        if reported is not None:
            raise RuntimeError(f"rank {rank}: {reported}")
    return result  # pyright: ignore[reportReturnType]


class GpuPeers:
    """GPUs of one host, through torch's symmetric memory and stream memory operations.

    https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEMOP.html
    """

    def __init__(self, group: dist.ProcessGroup, flags: int) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.unseen_bytes = 0
        self._group = group
        os.environ.setdefault(NO_MULTICAST, "1")
        self._driver = _on_all(group, self._open_driver)
        self._handles: list[Any] = []  # what keeps the other ranks' memory mapped
        self._signals = self.share(flags * self.size, torch.int32)
        self._try_out()

    def _open_driver(self) -> ctypes.CDLL:
        """The CUDA driver, if it says that this GPU reaches all others."""
        here, count = torch.cuda.current_device(), torch.cuda.device_count()
        for there in range(self.size):
            if there != here and (there >= count or not torch.cuda.can_device_access_peer(here, there)):
                raise RuntimeError(f"no access from GPU {here} to GPU {there}")
        return ctypes.CDLL("libcuda.so.1")

    def _try_out(self) -> None:
        """Read from every other rank, write into its memory and raise a flag there, and see whether all of it arrives:
        there are hosts whose driver promises more than their PCIe bridges keep. Flags are looked at before they are
        waited for, so that the wait ends.
        """
        others = [peer for peer in range(self.size) if peer != self.rank]
        pattern = torch.arange(TRIAL_ELEMENTS, dtype=torch.int32, device="cuda")
        # by rank: a page of its own, and one for each that the other ranks write
        pages = [
            memory.view(self.size, TRIAL_ELEMENTS) for memory in self.share(self.size * TRIAL_ELEMENTS, torch.int32)
        ]

        def write() -> None:
            pages[self.rank][self.rank].copy_(pattern + self.rank)
            written = pattern - self.rank
            for peer in others:
                pages[peer][self.rank].copy_(written)
                self.signal(peer, TRIAL_FLAG)
            torch.cuda.synchronize()

        def look() -> None:
            if self.raised() != len(others):
                raise RuntimeError("what other ranks write is not seen")
            for peer in others:
                self.wait(peer, TRIAL_FLAG)
                read = torch.empty_like(pattern)
                read.copy_(pages[peer][peer])
                if not (read.equal(pattern + peer) and pages[self.rank][peer].equal(pattern - peer)):
                    raise RuntimeError(f"copies from and to rank {peer} do not arrive as they left")

        _on_all(self._group, write)
        _on_all(self._group, look)  # the first flag in earnest finds them down
        following = (self.rank + 1) % self.size  # were all to read from one rank, they would share its link
        self.link_rate = _copy_rate(pages[following][following], pattern)

    def share(self, elements: int, dtype: torch.dtype) -> list[torch.Tensor]:
        from torch.distributed import _symmetric_memory as symmetric

        def allocate() -> torch.Tensor:
            before = torch.cuda.memory_allocated()
            own = symmetric.empty(elements, dtype=dtype, device=torch.device("cuda", torch.cuda.current_device()))
            self.unseen_bytes += own.nbytes - (torch.cuda.memory_allocated() - before)
            own.zero_()
            torch.cuda.synchronize()  # no one is to write into what another has yet to fill
            return own

        own = _on_all(self._group, allocate)
        handle: Any = _on_all(self._group, lambda: symmetric.rendezvous(own, self._group))
        self._handles.append(handle)
        return [own if peer == self.rank else handle.get_buffer(peer, (elements,), dtype) for peer in range(self.size)]

    def signal(self, peer: int, flag: int) -> None:
        self._call("cuStreamWriteValue32_v2", self._signals[peer], flag * self.size + self.rank, 1)

    def wait(self, peer: int, flag: int) -> None:
        own = self._signals[self.rank], flag * self.size + peer
        self._call("cuStreamWaitValue32_v2", *own, 1)
        self._call("cuStreamWriteValue32_v2", *own, 0)

    def raised(self) -> int:
        return int(self._signals[self.rank].sum())

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _call(self, function: str, flags: torch.Tensor, index: int, value: int) -> None:
        """With the driver's flags 0: write behind all earlier work, copies into other memories included, and wait for
        at least ``value``.
        """
        status = getattr(self._driver, function)(
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            ctypes.c_uint64(flags.data_ptr() + flags.itemsize * index),
            ctypes.c_uint32(value),
            ctypes.c_uint(0),
        )
        if status:
            raise RuntimeError(f"{function} returned {status}")


def _copy_rate(page: torch.Tensor, into: torch.Tensor) -> float:
    """Bytes per second."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(TIMED_COPIES):
        into.copy_(page)
    end.record()
    end.synchronize()
    return TIMED_COPIES * page.nbytes * 1000 / start.elapsed_time(end)


def check_processor() -> None:
    """What is written first has to be seen first; other processors do not keep to it by themselves.

    Raises:
        RuntimeError: this is such a processor.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise RuntimeError(f"on {platform.machine()} processors")


class HostPeers:
    """Ranks on the CPUs of one host, through files in memory. They are removed from the directory as soon as every rank
    has mapped them.
    """

    def __init__(self, group: dist.ProcessGroup, flags: int) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.unseen_bytes, self.link_rate = 0, float("inf")
        self._group = group
        _on_all(group, check_processor)
        self._signals = self.share(flags * self.size, torch.int32)

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

    def signal(self, peer: int, flag: int) -> None:
        self._signals[peer][flag * self.size + self.rank] = 1

    def wait(self, peer: int, flag: int) -> None:
        own = self._signals[self.rank][flag * self.size + peer]
        while own.item() == 0:
            time.sleep(LOOK_SECONDS)
        own.zero_()

    def raised(self) -> int:
        return int(self._signals[self.rank].sum())

    def capturing(self) -> bool:
        return False
