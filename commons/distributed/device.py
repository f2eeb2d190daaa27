"""Which device this rank computes on. With commons.distributed.process_group, which joins the ranks, the only place
that branches on cuda or cpu.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Device:
    """Where this rank computes, and its place in the job.

    Attributes:
        type: "cuda" or "cpu".
        name: of the GPU or CPU model, as its driver or system gives it.
        rank, local_rank, world_size: see commons.lifecycle.job.
    """

    type: str
    name: str
    rank: int
    local_rank: int
    world_size: int

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device("cuda", self.local_rank) if self.type == "cuda" else torch.device("cpu")

    def synchronize(self) -> None:
        """Wait until everything given to the device is done."""
        if self.type == "cuda":
            import torch

            torch.cuda.synchronize()

    def reset_peak_memory(self) -> None:
        if self.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype that ``--precision`` names."""
    import torch

    return getattr(torch, DTYPE_NAMES[precision])


def detect_type(wanted: str) -> str:
    """Resolve "auto" to "cuda" where torch sees a GPU, else "cpu". Changes nothing; see :func:`hide_gpus`."""
    if wanted != "auto":
        return wanted
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def hide_gpus() -> None:
    """Hide the GPUs from this process, which is to compute on its CPU.

    Colossal-AI's host backend must never run beside a visible GPU. Called where a process joins its job
    (commons.distributed.process_group.launch), before CUDA is first asked: afterwards it would change nothing.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
