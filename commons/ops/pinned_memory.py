"""Pinned host memory of exactly the bytes that are asked for.

torch's allocator of pinned memory rounds every block up to a power of two: the fp32 piece of a gpt2_10b block, 805 MB,
takes 1 GiB. Memory that lives as long as the model does better as pages of its own, which are made known to CUDA.

``cudaHostRegister``: https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__MEMORY.html
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import torch

from commons.lifecycle.notices import say

SMALLEST_BYTES = 1 << 20  # below, torch's rounding costs less than a registration of its own does time


class RegisteredPages(mmap.mmap):
    """Pages of this process alone that CUDA knows as pinned, until they are freed.

    Attributes:
        address: of the first one once CUDA knows them, 0 before.
    """

    address = 0

    def __del__(self) -> None:
        if self.address:
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()  # a copy may still read them; torch's allocator is not there to know
                _runtime().cudaHostUnregister(self.address)


def pinned_empty(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised tensor [elements] in pinned host memory, for copies that do not wait; pageable without CUDA.

    Where CUDA does not register the pages (a limit of locked memory, WSL), torch's allocator pins, which may round up
    to twice as much, and a line says so.

    Raises:
        RuntimeError: no memory can be pinned at all.
    """
    if not torch.cuda.is_available():
        return torch.empty(elements, dtype=dtype)
    size = elements * dtype.itemsize
    if size < SMALLEST_BYTES:
        return torch.empty(elements, dtype=dtype, pin_memory=True)
    pages = RegisteredPages(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_DONTFORK)  # a child's copy would leave this process with other pages than CUDA knows
    tensor = torch.frombuffer(pages, dtype=dtype)  # keeps the pages
    if problem := _register(tensor.data_ptr(), size):
        say(f"pinned memory cannot be registered ({problem}): torch pins it, in blocks rounded up to powers of two")
        return torch.empty(elements, dtype=dtype, pin_memory=True)
    pages.address = tensor.data_ptr()
    return tensor


def _register(address: int, size: int) -> str:
    """Make pages known to CUDA; why that was refused, "" where it was not."""
    code = int(_runtime().cudaHostRegister(address, size, 0))
    if code == 0:
        return ""
    with contextlib.suppress(Exception):
        torch.zeros(1, device="cuda")  # CUDA keeps the error for the next launch to find
    return f"CUDA error {code}"


def _runtime() -> Any:
    return torch.cuda.cudart()
