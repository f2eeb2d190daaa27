"""Where torch's own plans keep their training states: fp32 parameters are the masters, AdamW's moments lie beside
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from commons.plans.states import Held

MOMENTS = ("exp_avg", "exp_avg_sq")


def moments_of(optimizer: Any, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's moments of one parameter, made as its first step would make them."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        for name in MOMENTS:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return {name: _local(state[name]) for name in MOMENTS}


def _local(tensor: Any) -> torch.Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class _AdamWHolder:
    """What the holders share: the step count lies beside the moments, on the device."""

    def __init__(self, model: nn.Module, optimizer: Any, rank: int, ranks: int) -> None:
        self._model, self._optimizer = model, optimizer
        self._rank, self._ranks = rank, ranks

    def _own(self) -> Any:
        """The AdamW whose states are this rank's."""
        return self._optimizer

    def refresh(self) -> None:
        """The masters are what is computed with."""

    def updates(self) -> int:
        return next((int(state["step"].item()) for state in self._own().state.values() if state), 0)

    def set_updates(self, updates: int) -> None:
        for state in self._own().state.values():
            state["step"].fill_(updates)


class ReplicatedHolder(_AdamWHolder):
    """DDP: every rank has everything; each writes every so-manieth parameter."""

    def held(self) -> Iterator[Held]:
        for index, (name, parameter) in enumerate(self._model.named_parameters()):
            tensors = {"master": parameter.detach(), **moments_of(self._optimizer, parameter)}
            yield Held(name, tuple(parameter.shape), 0, tensors, writes=index % self._ranks == self._rank)


class PartitionedHolder(_AdamWHolder):
    """ZeroRedundancyOptimizer: every rank has all masters, and the moments of its own parameters, which it writes."""

    def _own(self) -> Any:
        return self._optimizer.optim

    def held(self) -> Iterator[Held]:
        own = {parameter for group in self._own().param_groups for parameter in group["params"]}
        for name, parameter in self._model.named_parameters():
            moments = moments_of(self._own(), parameter) if parameter in own else {}
            tensors = {"master": parameter.detach(), **moments}
            yield Held(name, tuple(parameter.shape), 0, tensors, writes=parameter in own)


class ShardedHolder(_AdamWHolder):
    """FSDP2: rows of every parameter; ``shards`` where the optimizer's are plain tensors (ShardAdamW)."""

    def held(self) -> Iterator[Held]:
        shards: dict[Any, Any] = dict(getattr(self._optimizer, "shards", ()))
        for name, parameter in self._model.named_parameters():
            local = _local(parameter)
            row = local.numel() // local.shape[0] if local.shape[0] else 0
            begin = self._first_row(parameter) * row
            tensors = {"master": local, **moments_of(self._optimizer, shards.get(parameter, parameter))}
            flat = {kind: tensor.view(-1) for kind, tensor in tensors.items()}
            yield Held(name, tuple(parameter.shape), begin, flat)

    def _first_row(self, parameter: Any) -> int:
        """Of this rank's part: FSDP2 cuts the first dimension as torch.chunk does."""
        per_rank = -(-parameter.shape[0] // self._ranks)
        return min(self._rank * per_rank, parameter.shape[0])


HOLDERS = {"ddp": ReplicatedHolder, "zero": PartitionedHolder, "fsdp": ShardedHolder}
