"""How a process of a job leaves its process group, and ends."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import NoReturn


def teardown() -> None:
    """Leave the process group (collective), if there is one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_loss_of_a_peer(error: BaseException) -> bool:
    """Whether ``error`` is what a rank gets when another one has gone, in a job of several."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def leave_together(exit_code: int) -> NoReturn:
    """Leave (see there) when all ranks have come here, or as soon as one has gone (collective)."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    leave(exit_code)


def leave(exit_code: int) -> NoReturn:
    """Leave the process group (collective) and end the process at once.

    The interpreter's own end would race with the threads of gloo and of the compiler, which can abort a run that
    is done and well (seen once in forty FSDP runs on a CPU: "terminate called without an active exception").
    """
    teardown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it has gone
            stream.flush()
    os._exit(exit_code)
