"""FSDP's optimizer on plain shards, against AdamW on the same numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from commons.plans.torch_native import ShardAdamW


class Part(torch.Tensor):
    """In place of a DTensor, which takes a process group."""

    def to_local(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def part(*values: float) -> Any:
    return torch.tensor(values).as_subclass(Part)


def stepped(gradients: list[Any]) -> list[torch.Tensor]:
    """The parameter after each step of ShardAdamW, whose gradients nobody clears in between; None: there is none."""
    parameter: Any = nn.Parameter(part(1.0, -2.0))
    optimizer = ShardAdamW([{"params": [parameter], "weight_decay": 0.1}], lr=0.1)
    seen = []
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
        seen.append(parameter.to_local().detach().clone())
    return seen


def test_shards_are_updated_by_the_gradients_of_their_own_step() -> None:
    values = [[0.5, -0.1], [-3.0, 0.2], [0.0, 7.0]]
    expected: Any = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.AdamW([expected], lr=0.1, weight_decay=0.1)
    found = stepped([part(*each) for each in values])
    for gradient, after in zip(values, found, strict=True):
        expected.grad = torch.tensor(gradient)
        optimizer.step()
        assert torch.equal(after, expected.detach())


def test_a_shard_without_a_gradient_stays_as_it_is() -> None:
    first, second = stepped([part(0.5, -0.1), None])
    assert torch.equal(first, second)


def test_what_is_cleared_is_cleared_for_shard_and_parameter() -> None:
    parameter: Any = nn.Parameter(part(1.0))
    optimizer = ShardAdamW([{"params": [parameter]}], lr=0.1)
    parameter.grad = part(1.0)
    optimizer.step()
    optimizer.zero_grad()
    (shard,) = optimizer.param_groups[0]["params"]
    assert parameter.grad is None and shard.grad is None
