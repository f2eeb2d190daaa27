"""The age of the GPU, asked here and nowhere else, so that a test can have another one."""

from __future__ import annotations

AMPERE = (8, 0)  # from which on GPUs compute in bf16, and fused attention and Triton take it


def gpu_capability(index: int | None = None) -> tuple[int, int]:
    """CUDA compute capability of a GPU of this process, (9, 0) for an H100 (default: of the current one)."""
    import torch

    return torch.cuda.get_device_capability(index)
