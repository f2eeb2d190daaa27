"""The age of the GPU, asked here and nowhere else, so that a test can have another one."""

from __future__ import annotations

AMPERE = (8, 0)  # from which on GPUs compute in bf16, and fused attention and Triton take it


def gpu_capability(index: int | None = None) -> tuple[int, int] | None:
    """CUDA compute capability of a GPU of this process, (9, 0) for an H100 (default: of the current one); None where
    there is none.
    """
    import torch

    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


def is_older(first: tuple[int, int]) -> bool:
    """Whether the current GPU is older than those of capability ``first``. What is not there is not too old."""
    here = gpu_capability()
    return here is not None and here < first
