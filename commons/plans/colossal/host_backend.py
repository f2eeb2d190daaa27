"""Colossal-AI's Gemini, ZeRO and hybrid plans on a machine without a GPU: gloo ranks, host memory as the
device.

Colossal-AI distinguishes "on the device" from "offloaded to the host" by ``device.type`` ("cuda" against "cpu"), and
its plugins insist on an accelerator named cuda or npu. Every torch call, on the other hand, takes a string as
a device. So the accelerator below is called "cuda" and its current device is a string that says "cpu" to
torch and ``type == "cuda"`` to Colossal-AI: the chunk state machine runs unpatched, moves and gathers
included, and each of them can be counted.

What it cannot show: stream races, missing copies, pinned memory, NCCL, and how much memory a GPU would need.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import psutil
import torch
from colossalai.accelerator import BaseAccelerator, CpuAccelerator, set_accelerator


class HostDevice(str):
    """The host's memory in the role of the accelerator's: "cpu" for torch, ``type == "cuda"`` for
    Colossal-AI.
    """

    type = "cuda"
    index = 0  # pyright: ignore[reportAssignmentType]  (str has a method of that name)

    def __new__(cls) -> HostDevice:
        return super().__new__(cls, "cpu")


class HostStream(torch.Stream):
    """A stream on a device that runs everything at once: waiting for it is never needed."""

    def __new__(cls) -> HostStream:
        return super().__new__(cls, stream_id=0, device_index=0, device_type=0)

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


class HostAccelerator(CpuAccelerator):
    """Colossal-AI's CPU accelerator under the name that its plugins ask for, with the calls that a device
    has.
    """

    support_set_device = False

    def __init__(self) -> None:
        BaseAccelerator.__init__(self, name="cuda", communication_backend="gloo", is_synchronous=True)

    def get_current_device(self) -> Any:
        return HostDevice()

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any = None) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...

    def empty_cache(self) -> None: ...

    def Stream(self, device: Any = None, priority: int = 0, **kwargs: Any) -> HostStream:
        return HostStream()

    def current_stream(self, device: Any = None) -> HostStream:
        return HostStream()

    default_stream = current_stream  # pyright: ignore[reportAssignmentType]

    def stream(self, stream_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)


class HostMemoryMonitor:
    """What ``SyncCudaMemoryMonitor`` measures, computed instead: the chunks' bytes plus a fixed working set.

    Args:
        chunk_manager: Gemini's; its ``total_mem["cuda"]`` counts the chunks on the device, in bytes.
        working_set_bytes: stands for activations, which host memory does not count separately.
    """

    def __init__(self, chunk_manager: Any, working_set_bytes: int) -> None:
        self._chunk_manager = chunk_manager
        self._working_set_bytes = working_set_bytes

    def start(self) -> None: ...

    def finish(self) -> int:
        return self._chunk_manager.total_mem["cuda"] + self._working_set_bytes


def install(capacity_bytes: int | None = None, working_set_bytes: int = 0) -> None:
    """Make Colossal-AI run on host memory in this process.

    Args:
        capacity_bytes: what placement "auto" takes for the device's memory; default: the machine's.
        working_set_bytes: what placement "auto" takes for the activations.

    Raises:
        RuntimeError: where a CUDA device is visible. The host backend must never hide a real device.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the host backend is for machines without a GPU, but torch sees a CUDA device")
    set_accelerator(HostAccelerator())
    _give_record_stream_to_cpu()
    _answer_device_calls()
    _answer_memory_questions(capacity_bytes or psutil.virtual_memory().total, working_set_bytes)


@functools.cache
def _give_record_stream_to_cpu() -> torch.library.Library:
    """ZeRO records its gradient buckets on the communication stream; the CPU has no such operation and needs
    none.

    ``_run_reduction``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/low_level/low_level_optim.py
    The library object is cached because the registration ends with it.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("record_stream", lambda tensor, stream: None, "CPU")
    return library


def _answer_device_calls() -> None:
    """Tensor and pipeline parallelism name CUDA directly at three places.

    ``torch.cuda.set_device``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/shardformer/modeling/gpt2.py
    ``Tensor.cuda``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/shardformer/layer/qkv_fused_linear.py
    ``dist.is_hccl_available``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/pipeline/p2p.py
    """
    torch.cuda.set_device = lambda device: None
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # pyright: ignore[reportAttributeAccessIssue]
    torch.distributed.is_hccl_available = lambda: False  # pyright: ignore[reportAttributeAccessIssue]
    torch.distributed.Backend.HCCL = "hccl"  # pyright: ignore[reportAttributeAccessIssue]


def _answer_memory_questions(capacity_bytes: int, working_set_bytes: int) -> None:
    """Placement "auto" asks the CUDA driver what is free and what an operation took.

    ``AutoPlacementPolicy``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/placement_policy.py
    https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/memory_tracer/memstats_collector.py
    """
    from colossalai.legacy.utils import memory
    from colossalai.zero.gemini import gemini_mgr
    from colossalai.zero.gemini.memory_tracer import ChunkMemStatsCollector

    class HostMemStatsCollector(ChunkMemStatsCollector):
        def __init__(self, chunk_manager: Any, memstats: Any = None) -> None:
            super().__init__(chunk_manager, memstats)
            self._mem_monitor = HostMemoryMonitor(chunk_manager, working_set_bytes)

    gemini_mgr.ChunkMemStatsCollector = HostMemStatsCollector
    memory.colo_device_memory_capacity = lambda device: capacity_bytes
