"""Pinned host memory of exactly the bytes asked for. What CUDA answers is made up where there is no GPU."""

from __future__ import annotations

import gc
import mmap
import sys

import pytest
import torch
from suite_runs import run_processes

from commons.ops import pinned_memory
from commons.ops.pinned_memory import SMALLEST_BYTES, pinned_empty

ELEMENTS = 3 * SMALLEST_BYTES // 4 + 5  # of 4 bytes; no power of two, and no whole number of pages


class Runtime:
    """CUDA's, as far as it is asked here."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.registered, self.calls = code, {}, []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append((address, size, flags))
        if self.code == 0:
            self.registered[address] = size
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    made_up = Runtime()
    monkeypatch.setattr(pinned_memory, "_runtime", lambda: made_up)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return made_up


def test_exactly_the_bytes_are_registered_and_given_back(runtime: Runtime) -> None:
    memory = pinned_empty(ELEMENTS, torch.float32)
    ((address, size, flags),) = runtime.calls
    assert (address, size, flags) == (memory.data_ptr(), 4 * ELEMENTS, 0)
    assert address % mmap.PAGESIZE == 0 and (memory.shape, memory.dtype) == ((ELEMENTS,), torch.float32)
    part = memory.fill_(2.0)[7:]
    del memory
    gc.collect()
    assert runtime.registered, "a view keeps it"
    assert part.sum().item() == 2.0 * (ELEMENTS - 7)
    del part
    gc.collect()
    assert not runtime.registered


def test_where_it_cannot_be_registered_a_line_says_so(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """torch is asked instead, and with the right words: here it has nothing to pin with."""
    runtime.code = 2
    asked = []

    def empty(elements: int, *, dtype: torch.dtype, pin_memory: bool) -> str:
        asked.append((elements, dtype, pin_memory))
        return "torch's"

    monkeypatch.setattr(torch, "empty", empty)
    assert pinned_empty(ELEMENTS, torch.float16) == "torch's"
    assert asked == [(ELEMENTS, torch.float16, True)]
    assert "pinned memory cannot be registered (CUDA error 2)" in "".join(capfd.readouterr())
    gc.collect()
    assert not runtime.registered


def test_without_cuda_it_is_plain_memory() -> None:
    if not torch.cuda.is_available():
        assert pinned_empty(ELEMENTS, torch.bfloat16).shape == (ELEMENTS,)


CHUNKS = """
import os, sys, types
import torch, torch.distributed as dist
from commons.plans.colossal.runtime import prepare
prepare("cpu")
from commons.plans.colossal import suite_chunk
pinned = []
def pinned_empty(elements, dtype):
    pinned.append(elements * dtype.itemsize)
    return torch.empty(elements, dtype=dtype)
suite_chunk.pinned_empty = pinned_empty
real_empty = torch.empty
def empty(*sizes, pin_memory=False, **options):
    assert not pin_memory, "by torch's allocator"
    return real_empty(*sizes, **options)
torch.empty = empty
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def chunk(**options):
    made = suite_chunk.SuiteChunk(1000, dist.group.WORLD, torch.float32, pin_memory=True, **options)
    made.append_tensor(torch.arange(1000, dtype=torch.float32))
    made.close_chunk()
    return made
host, stays, moves = chunk(cpu_shard_init=True), chunk(), chunk()
assert pinned == [4000], "only the one that begins on the host"
assert stays.cpu_shard is None and host.payload.tolist() == list(range(1000))
from colossalai.accelerator import get_accelerator
device = get_accelerator().get_current_device()
for times in range(2):
    moves.shard_move(torch.device("cpu"))
    assert moves.device_type == "cpu" and moves.cpu_shard.tolist() == list(range(1000))
    kept = moves.cpu_shard.data_ptr()
    moves.shard_move(device)
    assert moves.cuda_shard.tolist() == list(range(1000)) and moves.cpu_shard.data_ptr() == kept
assert pinned == [4000, 4000], "once, when it first moves"
print("as it should be", flush=True)
os._exit(0)
"""


def test_chunks_pin_what_moves_to_the_host_once() -> None:
    """Upstream pins a place for every chunk, also for those that never move, and by torch's allocator."""
    code, console = run_processes([sys.executable, "-c", CHUNKS])
    assert code == 0 and "as it should be" in console, console


@pytest.mark.gpu
def test_a_gpu_takes_it_for_pinned() -> None:
    memory = pinned_empty(ELEMENTS, torch.float32)
    assert memory.is_pinned()
    memory.copy_(torch.arange(ELEMENTS, dtype=torch.float32))
    there = memory.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(there.cpu(), memory)
    memory.zero_()
    memory.copy_(there, non_blocking=True)
    torch.cuda.synchronize()
    assert memory[-1].item() == float(ELEMENTS - 1)
    del memory
    gc.collect()
    torch.cuda.synchronize()
    again = pinned_empty(ELEMENTS, torch.float32)
    assert again.is_pinned(), "the pages were given back and can be registered again"
