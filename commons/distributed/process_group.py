"""Joining the process group, and what all its ranks agree on."""

from __future__ import annotations

import datetime
import os
import socket
from typing import TYPE_CHECKING, Any

from commons.distributed.device import Device, hide_gpus
from commons.lifecycle.cpu_name import cpu_name
from commons.lifecycle.job import read_job

if TYPE_CHECKING:
    import torch


def free_port() -> int:
    """A TCP port on the loopback interface that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(device_type: str, timeout_seconds: float) -> Device:
    """Join the process group (collective): NCCL on GPUs, gloo on CPUs.

    The rank's place is commons.lifecycle.job's: that of a launcher, or a job of one rank. For "cpu" the GPUs are hidden
    from this process.

    Args:
        device_type: "cuda" or "cpu", already resolved.
        timeout_seconds: after which a stuck collective ends the process.
    """
    import torch
    import torch.distributed as dist

    job = read_job()
    # Colossal-AI and torch look there themselves
    os.environ.update(job.as_environment(job.master_port or free_port()))
    name = cpu_name()
    if device_type == "cuda":
        torch.cuda.set_device(job.local_rank)
        name = torch.cuda.get_device_name(job.local_rank)
    else:
        hide_gpus()
    timeout = datetime.timedelta(seconds=timeout_seconds)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timeout, **_meeting_place(timeout))
    return Device(device_type, name, dist.get_rank(), job.local_rank, dist.get_world_size())


def _meeting_place(timeout: datetime.timedelta) -> dict[str, Any]:
    """Arguments of init_process_group for a run that torchrun's engine started again: a part of the store that
    the attempts before have not written in.

    torch takes it for granted that every attempt has a store of its own. With torchrun's static rendezvous none
    but the first has, and ranks would call at the addresses of the dead.
    """
    import torch.distributed as dist

    attempt = read_job().attempt
    if attempt == 1:
        return {}
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    return {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": world_size}


def every_rank(here: bool, device: torch.device) -> bool:
    """Whether it is so on every rank, which compute on ``device`` (collective)."""
    import torch
    import torch.distributed as dist

    everywhere = torch.tensor(float(here), device=device)
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere.item())


def first_rank_s(text: str) -> str:
    """The first rank's ``text``, on every rank (collective)."""
    import torch.distributed as dist

    texts = [text]
    dist.broadcast_object_list(texts)
    return texts[0]
