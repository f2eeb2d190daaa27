"""train_gpt_demo.py on a rank that runs out of memory. SHORTAGE says how and where: "kind:rank:phase:step".

Everything but the shortage is the training itself.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

import train_gpt_demo
from commons.lifecycle.guard import Guard
from commons.lifecycle.job import read_job

ALLOCATORS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.25 GiB is free."
    " Including non-PyTorch memory, this process has 77.86 GiB memory in use. Of the allocated memory 70.50 GiB is"
    " allocated by PyTorch, and 6.20 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is"
    " large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
BARE = "CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"


def gpu() -> None:
    raise torch.OutOfMemoryError(ALLOCATORS)


def bare() -> None:
    raise RuntimeError(BARE)


def tensor() -> None:
    """A real one, of torch's own allocator of host memory: more than any address space."""
    torch.empty(1 << 50, dtype=torch.float32)


def memory_error() -> None:
    """A real one, of Python's."""
    bytearray(1 << 60)


def eat() -> None:
    """Until the kernel ends it; slowly enough to be seen."""
    kept = []
    while True:
        kept.append(bytearray(os.urandom(1 << 20) * 16))
        time.sleep(0.05)


SHORTAGES = {"gpu": gpu, "bare": bare, "tensor": tensor, "memory_error": memory_error, "eat": eat}


class ShortGuard(Guard):
    """At the beginning of the phase the shortage comes."""

    def beat(self, phase: str, step: int | None = None) -> None:
        super().beat(phase, step)
        kind, rank, *place = os.environ["SHORTAGE"].split(":")
        here = self._pulse.last
        if [str(read_job().rank), here.phase, str(here.step)] == [rank, *place]:
            Path(os.environ["REACHED"]).write_text(str(os.getpid()))
            SHORTAGES[kind]()


if __name__ == "__main__":
    from commons.lifecycle import guard

    guard.Guard = ShortGuard  # what on_duty() makes
    train_gpt_demo.main(sys.argv[1:])
