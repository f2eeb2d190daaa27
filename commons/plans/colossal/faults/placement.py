"""Static placement: a fraction is one of bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.placement_policy import StaticPlacementPolicy

from commons.plans.colossal.chunks import first_that_fit
from commons.plans.colossal.faults.base import UpstreamFault


class FractionsCountParameters(UpstreamFault):
    file = "zero/gemini/placement_policy.py"
    function = "StaticPlacementPolicy.setup_grads_device and evict_tensors"
    symptom = (
        "memory is counted once per parameter instead of once per chunk: offload_optim_frac 0.5 moves all chunks;"
        " which chunks are moved depends on the addresses of objects; and offload_param_frac below 1 moves nothing"
    )

    def seen(self) -> bool:
        """Ask for half of two equal chunks with two parameters each. Upstream puts the gradients of both on the host,
        and after their use neither's parameters.
        """
        chunks = [_ProbeChunk(["a", "b"]), _ProbeChunk(["c", "d"])]
        owner = {param: chunk for chunk in chunks for param in chunk.get_tensors()}
        moved: list[Any] = []
        manager: Any = SimpleNamespace(
            get_chunk=owner.__getitem__,
            release_chunk=lambda chunk: None,
            move_chunk=lambda chunk, device: moved.append(chunk),
        )
        devices: dict[Any, Any] = {}
        policy: Any = StaticPlacementPolicy(manager, offload_optim_frac=0.5)
        policy.setup_grads_device(list(owner), devices)
        policy = StaticPlacementPolicy(manager, offload_optim_frac=1.0, offload_param_frac=0.5)
        policy.setup_grads_device(list(owner), {})
        for chunk in chunks:
            policy.evict_tensors([chunk])
        # the device is no torch.device under the host backend, whose type says "cuda"
        return [device.type for device in devices.values()].count("cpu") != 2 or len(moved) != 1

    def mend(self) -> None:
        StaticPlacementPolicy.setup_grads_device = _setup_grads_device
        StaticPlacementPolicy.evict_tensors = _evict_tensors


class _ProbeChunk:
    chunk_mem, keep_gathered = 100, False

    def __init__(self, params: list[str]) -> None:
        self._params = params

    def get_tensors(self) -> list[str]:
        return self._params


def _first_that_fit(chunks: list, fraction: float) -> list:
    """Chunks while they fit into ``fraction`` of the bytes of all: never more than that, and 1 takes all."""
    room = sum(chunk.chunk_mem for chunk in chunks) * fraction
    movable = [chunk for chunk in chunks if not chunk.keep_gathered]
    return first_that_fit(movable, [chunk.chunk_mem for chunk in movable], room)


def _setup_grads_device(self: Any, params: list, grads_device_map: dict) -> None:
    """Decide where each chunk's gradients, master weights and optimizer states live, which parameters wait for their
    next use on the host, and how much may stay gathered.

    Blocks come first, in their order; a rank takes the same ones as every other.
    """
    chunks = list(dict.fromkeys(self.chunk_manager.get_chunk(param) for param in params))  # a set has no order
    offloaded = set(_first_that_fit(chunks, self.offload_optim_frac))
    for chunk in chunks:
        device = torch.device("cpu") if chunk in offloaded else get_accelerator().get_current_device()
        for param in chunk.get_tensors():
            grads_device_map[param] = device
    self.waiting_on_host = set(_first_that_fit(chunks, self.offload_param_frac))
    self.keep_gathered_chunk_mem = sum(chunk.chunk_mem for chunk in chunks) * (1 - self.shard_param_frac)


def _evict_tensors(self: Any, can_evict_chunks: list, **_: Any) -> tuple[int, float]:
    """Release what is more than may stay gathered, and take to the host what waits there.

    Upstream compares the bytes in use at the moment, a chunk or two, with a share of the whole model's.
    """
    in_use = sum(chunk.chunk_mem for chunk in can_evict_chunks)
    for chunk in can_evict_chunks:
        if in_use <= self.keep_gathered_chunk_mem:
            break
        self.chunk_manager.release_chunk(chunk)
        in_use -= chunk.chunk_mem
    for chunk in can_evict_chunks:
        if chunk in self.waiting_on_host:
            self.chunk_manager.move_chunk(chunk, torch.device("cpu"))
    return 0, 0.0
